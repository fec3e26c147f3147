"""The steps of each mode, by topic.

`batch`, `endpoint` and `stream` score; `scheduler` chooses between them; `spot` is about machines that may vanish;
`storage` reads and writes; `common` is what several topics share.
"""
