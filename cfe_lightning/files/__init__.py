"""Files: atomic writes, plain tensor files, trusted class paths, configs, short texts and typed options."""
