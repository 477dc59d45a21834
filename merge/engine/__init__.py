"""The merging model of joint runs, until both share one."""
