"""Files: atomic writes, plain tensor files, trusted class paths, and configs."""
