"""Block I/O engines against each other and against fio, on one file."""
