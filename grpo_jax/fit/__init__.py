"""What a run needs of a device's memory, found by compiling it, and the micro-batch that fits."""
