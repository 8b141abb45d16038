"""Every reader against inputs that nobody would write: each is read, or told as an error of ours."""
