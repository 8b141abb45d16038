"""``regraft ui``: the whole path in a browser, for people who don't open a terminal twice.

`worker` runs jobs of `work` in a process of its own; `desk` holds what is at work and what came of it; `shown` makes
HTML of records, `page` is the Gradio page over both, and `server` serves it on this machine.
"""
