"""generation/cluster.py: workers of Ray draw the bytes of one process, also when one of them is killed."""

import contextlib
import json
import logging
import os
import signal
import subprocess
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from samples import contents
from test_cli import PROGRAM
from test_draw import memory_for
from test_generation import options, silent

from diffumask_fast.borrow import patched_threads
from diffumask_fast.dataset.schema import SCHEMA
from diffumask_fast.errors import DiffuMaskError
from diffumask_fast.generation.cluster import DRIVERS, Cluster, Worker, _for_workers, _options_of, _place
from diffumask_fast.generation.generate import run_generate
from diffumask_fast.generation.options import GenerateOptions, PromptOptions
from diffumask_fast.generation.ray import Drawer
from diffumask_fast.masks.options import MaskOptions
from diffumask_fast.options import closed


@pytest.fixture(scope="module")
def joined():
    """Join this process to a new cluster with room for two workers of one thread; give Ray."""
    import ray

    log, name = logging.getLogger("ray"), "RAY_USAGE_STATS_ENABLED"
    log.setLevel(logging.ERROR)
    kept = os.environ.get(name)
    os.environ[name] = "0"
    try:
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False,
            object_store_memory=2**27,
        )  # fmt: skip
        yield ray
    finally:
        ray.shutdown()
        log.setLevel(logging.NOTSET)
        os.environ.pop(name)
        os.environ |= {name: kept} if kept is not None else {}


def drawing():
    """Return the processes of Ray in which a shard is being drawn."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(b"ray::Worker.draw"):
                found.append(int(path.parent.name))
    return found


@contextlib.contextmanager
def killing(total):
    """A progress bar that kills a worker once, when the first shard has come back."""
    killed, counts = [], []

    def advance(task, number=1):
        counts.append(number)
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            for pid in drawing()[:1]:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)

    yield SimpleNamespace(add_task=lambda *_, **__: 0, advance=advance)
    assert killed and sum(counts) == total


def test_a_worker_killed_in_a_shard_costs_that_shard_and_no_byte(joined, tiny_folder, tmp_path, caplog, capfd):
    asked = options(tmp_path / "ray", tiny_folder, num=14, shard_size=3, ray="local", workers=2)
    with caplog.at_level(logging.WARNING, "diffumask_fast"):
        summary = run_generate(asked, killing)
    lost = [record.getMessage() for record in caplog.records if "was lost" in record.getMessage()]
    assert len(lost) == 1 and lost[0].startswith("a worker of Ray was lost with shard") and len(lost[0]) < 200
    assert capfd.readouterr().out == ""
    assert summary["drawn"] == summary["images"] == 14 and summary["seconds"]["denoise"] > 0
    with patched_threads(1):
        run_generate(replace(asked, out=tmp_path / "one", ray=None, workers=None), silent)
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")
    assert json.loads((tmp_path / "ray" / "dataset.json").read_text())["environment"]["threads"] == 1


def test_rounds_until_each_class_has_its_number_are_those_of_one_process(joined, tiny_folder, tmp_path):
    limits = dict(num=None, accept_per_class=6, mask=MaskOptions(min_quality=0.05))
    asked = options(tmp_path / "ray", tiny_folder, ray="local", workers=1, **limits)
    summary = run_generate(asked, silent)
    with patched_threads(1):
        run_generate(replace(asked, out=tmp_path / "one", ray=None, workers=None), silent)
    assert contents(tmp_path / "ray") == contents(tmp_path / "one") and summary["below_quota"] == []


def test_a_worker_embeds_captions(joined, tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "captions.txt").write_text("\n".join(f"the {noun} {i}" for i in range(20) for noun in ("dog", "cat")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked = options(
        tmp_path / "ray", tiny_folder, ray="local", workers=1,
        captions=tmp_path / "captions.txt", retrieval="embedding", captions_per_class=12,
    )  # fmt: skip
    assert run_generate(asked, silent)["captions"] == {"cat": 12, "dog": 12}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    with patched_threads(1):
        run_generate(replace(asked, out=tmp_path / "one", ray=None, workers=None), silent)
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")


def test_a_worker_short_of_memory_says_the_batch_size_that_fits(tiny_folder, tmp_path):
    worker = Worker()
    asked = _for_workers(options(tmp_path / "out", tiny_folder))
    job = json.dumps(worker.begin(json.dumps(asdict(asked), default=str), "cpu", torch.get_num_threads())["job"])
    rows, seconds, batch_size = worker.draw(job, 0)
    assert len(rows) == 4 and seconds["denoise"] > 0 and batch_size == 2
    with memory_for(worker._pipe, lambda: 1):
        assert worker.draw(job, 0)[2] == 1
    assert worker.draw(job, 1)[2] == 1


def test_in_a_pipeline_of_ray_data(joined, tiny_folder, tmp_path):  # noqa: F811
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    items = [{"class": name, "seed": seed} for seed in range(2) for name in ("dog", "cat")]
    settings = {"model": str(tiny_folder), "classes": "dog,cat", "batch_size": 2, "loading": {"device": "cpu"}}
    settings |= {"mask": MaskOptions(threshold=0.4), "num_inference_steps": 2}
    drawn = ray.data.from_items(items).map_batches(
        Drawer, fn_constructor_kwargs=settings, batch_size=2, num_cpus=1, compute=ray.data.ActorPoolStrategy(size=1)
    )
    drawn.write_parquet(str(tmp_path / "out"))
    table = pq.read_table(tmp_path / "out").sort_by("key")
    here = Drawer(**settings)({name: [item[name] for item in items] for name in ("class", "seed")}).sort_by("key")
    assert table.schema.remove_metadata() == SCHEMA.remove_metadata()
    names = [name for name in SCHEMA.names if name != "maps"]
    assert table.select(names).to_pylist() == here.select(names).to_pylist()


@pytest.mark.slow
def test_an_error_of_a_worker_is_told_as_in_one_process(joined, tiny_folder, tmp_path):
    for changes, words in (
        ({"model": str(tmp_path / "nothing")}, "There is no model folder"),
        ({"size": "60x60"}, "height 60 is not a multiple of 8"),
        ({"mask": MaskOptions(min_area=0.999, max_area=1.0)}, "8 of the first 8 images were rejected"),
        ({"device": "cuda"}, "Ray sees no GPU in its cluster, but 2 CPUs: use `device=cpu`"),
    ):
        model = changes.pop("model", tiny_folder)
        asked = options(tmp_path / "out", model, num=8, ray="local", workers=1, **changes)
        with pytest.raises(DiffuMaskError, match=words) as caught:
            run_generate(asked, silent)
        assert "\n" not in str(caught.value) and not list(tmp_path.rglob("*.parquet"))
    assert drawing() == []


@pytest.mark.slow
def test_a_worker_that_is_lost_with_every_shard_stops_the_run(joined, tiny_folder, tmp_path):
    over = threading.Event()

    def kill():
        while not over.wait(0.2):
            for pid in drawing():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    asked = options(tmp_path / "out", tiny_folder, num=400, shard_size=400, ray="local", workers=1)
    try:
        with Cluster(asked) as cluster, pytest.raises(DiffuMaskError, match="4 workers of Ray were lost with shard 0"):
            next(cluster.draw_shards(cluster.job, [0]))
    finally:
        over.set()
        killer.join()


def group(pid):
    """Return the processes that belong to a session: the program, and what its Ray has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) == pid and state != "Z":
                found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_stopped_by_ctrl_c_nothing_stays_and_the_same_command_finishes(tiny_folder, tmp_path):
    out, size = tmp_path / "out", ["--num", "40", "--shard-size", "2"]
    command = [PROGRAM, "generate", str(out), "--model", str(tiny_folder), "--classes", "dog,cat", *size]
    command += ["--steps", "2", "--device", "cpu"]
    on_ray = [*command, "--ray", "local", "--workers", "2"]
    process = subprocess.Popen(
        on_ray, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 300
        while not list(out.glob("data/*.parquet")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 130 and output == ""
        assert errors == "Stopped; run the same command again to finish.\n"
        while group(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        for pid in group(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
    assert not list(tmp_path.rglob("*.tmp"))
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    subprocess.run([*command[:2], str(tmp_path / "one"), *command[3:]], check=True, capture_output=True)
    assert len(list(out.glob("data/*.parquet"))) == 20 and contents(out) == contents(tmp_path / "one")


def test_workers_draw_where_the_cluster_has_room(tmp_path):
    def place(resources, **changes):
        return _place(resources, options(tmp_path, "mini", **changes))

    assert place({"CPU": 16.0, "GPU": 8.0}, device="auto") == ("cuda", 8)
    assert place({"CPU": 16.0, "GPU": 8.0}, device="cuda", workers=3) == ("cuda", 3)
    assert place({"CPU": 16.0, "GPU": 8.0}) == ("cpu", 16)
    assert place({"CPU": 2.0}, device="auto", workers=5) == ("cpu", 5)
    with pytest.raises(DiffuMaskError, match="Ray sees no GPU in its cluster, but 2 CPUs: use `device=cpu`"):
        place({"CPU": 2.0}, device="cuda")


@pytest.mark.parametrize("classes", ["coco", "dog"])
def test_a_folder_is_no_class_list(classes, tmp_path, monkeypatch):
    (tmp_path / classes).mkdir()
    monkeypatch.chdir(tmp_path)
    assert _for_workers(options(tmp_path, "mini", classes=classes)).classes == classes


def test_options_mean_the_same_in_another_folder(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_folder.parent)
    Path("blob").write_text("dog\n")
    Path("names.txt").symlink_to("blob")  # what a suffix says is the link's own
    Path("own.json").write_text("{}")
    mask = replace(GenerateOptions.mask, threshold=0.3)  # what is left out stays the model's own
    given = options(tmp_path, tiny_folder.name, classes="names.txt", mask=mask, model_options=Path("own.json"))
    asked = _for_workers(replace(given, prompts=PromptOptions(3, Path("captions.txt"))))
    assert (
        asked.prompts == PromptOptions(3)
        and asked.model == str(tiny_folder)
        and asked.classes == str(tiny_folder.parent / "names.txt")
    )
    assert asked.model_options == str(tiny_folder.parent / "own.json")
    assert _for_workers(options(tmp_path, "mini")) == options(tmp_path, "mini")
    assert _for_workers(options(tmp_path, "mini", engine_path=Path("nowhere"))).engine_path == "nowhere"
    values = {name: value for name, value in asdict(asked).items() if name not in DRIVERS}
    assert _options_of(json.dumps(values)) == replace(asked, out=".")
    values["mask"] = asdict(MaskOptions(eps=0.5))
    assert closed(_options_of(json.dumps(values)).mask, MaskOptions()) == MaskOptions(eps=0.5)


def test_what_ray_is_missing_for_is_one_sentence(tiny_folder, tmp_path, monkeypatch):
    with pytest.raises(DiffuMaskError, match="`workers` are Ray's: say `ray=local` too"):
        run_generate(options(tmp_path / "out", tiny_folder, workers=2), silent)
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(DiffuMaskError, match=r"`ray` needs Ray .*: pip install 'diffumask-fast\[ray\]'"):
        run_generate(options(tmp_path / "out", tiny_folder, ray="local"), silent)
    assert not (tmp_path / "out").exists()
