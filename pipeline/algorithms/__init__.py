"""The maths of the four stages: torch and the standard library only, one function per equation."""
