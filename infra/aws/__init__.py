"""Overnight in an AWS account: one CloudFormation stack, and the machines that nights ask it for.

`template.yaml` is the stack. `session` opens AWS and puts its refusals into words. `stack` plans, makes, changes and
deletes the stack by change sets; `settings` has its parameters; `bucket` has releases in its bucket, and deletes it.
`capacity` sets how many machines its two Auto Scaling groups have.
"""

STACK = "overnight"
"""The name of the stack where none is given. Its import loads nothing of AWS."""

__all__ = ["STACK"]
