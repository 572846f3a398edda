"""Commands that use the trainer and that the trainer does not use: plan, bench, quickstart."""
