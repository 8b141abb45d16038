"""SIGKILL at random moments while regraft writes: the old output is whole afterwards, or the new one is."""
