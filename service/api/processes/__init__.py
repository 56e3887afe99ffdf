"""Child processes that can be killed, for work that nothing else can interrupt."""
