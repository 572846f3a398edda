"""One folder per operation: its function and block sizes, a plain reference, and an implementation per compiler."""
