"""Where a program runs: meshes, processes, compiled programs, memory, and text that is safe to print."""
