"""Code shared by all commands; importing the package loads no heavy library."""
