"""The terms of log K, a file each."""
