import align  # noqa: F401  # before the libraries of a tool: its --help imports none of them
