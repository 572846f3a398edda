"""Parameters in and out: Hugging Face folders, PEFT adapters, quantised storage, sharded loading, merged export."""
