"""Compiled replacements of the UNet and the decoder, and the worker that finishes a batch during the next one."""
