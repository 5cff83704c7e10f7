"""The sub-commands: a module each, with ``run(arguments) -> exit status``."""
