"""Checkpoints that can be loaded under any other layout: safetensors files and a JSON index, nothing pickled."""
