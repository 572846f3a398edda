"""Writes GGUF files for llama.cpp and Ollama: whole models, and adapters as LoRA files. It takes the extra `gguf`."""
