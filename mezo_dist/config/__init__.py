"""Every setting, typed and documented, and the reader of YAML files (torch-free)."""
