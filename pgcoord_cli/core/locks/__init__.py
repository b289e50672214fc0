"""One owner for a name, and commands that run while their process owns one."""
