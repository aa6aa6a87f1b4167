"""Rendered scenes with exact ground truth, one generator for every visual task and model.

`generator` makes scenes, `raster` and `raster_torch` draw the same pixels (one scene with numpy,
batches with torch), `questions` asks and describes, `mmbench` writes MMBench's file format.
"""
