"""The program from Python: the commands as functions, their results as objects and tables."""
