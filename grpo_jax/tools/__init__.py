"""The commands plan, bench and quickstart. They import the trainer; the trainer does not import them."""
