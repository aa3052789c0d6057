"""Outputs of a file for large sets of images, as a folder of parquet parts: on one machine, or on a Ray cluster."""
