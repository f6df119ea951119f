"""The paper's program's command line: draw the images of all classes that are not there yet."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from diffumask_fast.attention.families import has_unet
from diffumask_fast.console import progress_bar, run_program, say, stoppable
from diffumask_fast.dropin.class_folder import ClassFolder
from diffumask_fast.dropin.drawing import draw, plan_class
from diffumask_fast.dropin.options import DropinOptions
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.flags import with_flags
from diffumask_fast.models.arguments import check_draws_from_prompts
from diffumask_fast.models.loading import without_bars
from diffumask_fast.pipeline import DiffuMaskPipeline
from diffumask_fast.prompts.vocabulary import Vocabulary

STEPS, GUIDANCE = 50, 7.0


def run(options: DropinOptions) -> None:
    """Draw the images of all classes that are not there yet.

    Raises:
        DiffuMaskError: anything that keeps the run from starting or from going on, in one sentence.
    """
    voc = Vocabulary.voc()
    vocabulary = Vocabulary.named(Vocabulary.parse(options.classes, voc, "the layout of 20 classes").names)
    pipe = DiffuMaskPipeline.from_pretrained(options.model, dtype=options.dtype, device=options.device)
    info = pipe.info
    if not has_unet(pipe.pipe):
        raise DiffuMaskError(
            f"the paper's program draws with a UNet, and {info.identity} has a transformer: use diffumask-fast generate"
        )
    check_draws_from_prompts(pipe.pipe)
    unknown = [name for name in vocabulary.names if info.classes and name not in info.classes]
    if unknown:
        say(f"{options.model} never learnt {', '.join(unknown)}: its images will show little.", sys.stderr)
    best = (info.num_inference_steps, info.guidance_scale) if info.scenes is not None else (STEPS, GUIDANCE)
    steps = options.steps or best[0]
    guidance = best[1] if options.guidance_scale is None else options.guidance_scale
    settings = {
        "model": info.identity, "weights": pipe.weights, "scheduler": type(pipe.pipe.scheduler).__name__,
        "steps": steps, "guidance_scale": guidance,
    }  # fmt: skip
    size = pipe.batch_size(options.batch_size)
    for entry in vocabulary.entries:
        folder = ClassFolder(options.output, entry.name, options.image_number, settings)
        drawings = plan_class(pipe, entry, options.image_number, options.thread_num)
        num_tokens = max(sum(map(len, drawing.tokens.values())) for drawing in drawings)
        with folder.locked():
            missing = folder.missing(drawings)
            if options.record:
                folder.record(drawings)
            with without_bars(pipe.pipe), progress_bar(len(missing)) as bar:
                task = bar.add_task(entry.name, total=len(missing))
                for start in range(0, len(missing), size):
                    batch = missing[start : start + size]
                    for drawing, drawn in zip(batch, draw(pipe, batch, steps, guidance, num_tokens), strict=True):
                        folder.write(drawing, *drawn)
                        bar.advance(task)
        say(f"{folder.path}: {len(drawings)} images, {len(missing)} of them drawn now")


def command(options: DropinOptions) -> None:
    """Draw images and attention maps in the layout of the DiffuMask paper's program; run again to finish.

    docs/from-diffumask.md tells what is the same and what is not.
    """
    with stoppable("Stopped; run the same command again to finish."):
        run(options)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and end the process.

    The exit code is 0 when done, 1 after a sentence about what failed, 2 for wrong usage, 130 when stopped.
    """
    program = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    program.command()(with_flags(command, dash="_"))
    run_program(program, arguments, dash="_")
