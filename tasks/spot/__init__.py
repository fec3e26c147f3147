"""Machines that may vanish: notices of an interruption, the drain, and the purchase of machines under a deadline.

`drain` has notices and what is finished after one; `cloud_notices` reads those of the clouds, and `notice_poller` polls
them. `policy` decides between spot, on-demand and waiting; `replay` runs it over traces of spot availability. `night`
sends one batch run between the machines of two Prefect `work_pools`; `purchase` has its options and report, and
`night_report` publishes it.
"""
