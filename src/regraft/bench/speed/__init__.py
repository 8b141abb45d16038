"""``regraft bench speed``: seconds and memory at real models' true size, beside the plain way and the disk."""
