"""What is mounted in a sandbox: these files, which import nothing but the standard library and each other."""
