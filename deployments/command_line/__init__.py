"""The command line, `overnight`: what a person or a script calls instead of Python.

`application` assembles the commands and ends each of them, `console` has what they share. The commands lie by topic in
`batch_commands`, `deployment_commands`, `serving_commands`, `environment_commands`, `kubernetes`, `aws` and
`local_commands`. What is heavy is imported by the command that needs it, so that help comes at once.
"""

from deployments.command_line.application import app, main

__all__ = ["app", "main"]
