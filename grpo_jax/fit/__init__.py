"""Finds by compiling what a run needs of a device's memory, and chooses the micro-batch that fits."""
