"""Execution: mesh and sharding, several processes, compiled programs, memory, and text that is safe to print."""
