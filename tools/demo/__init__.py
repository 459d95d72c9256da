"""The demo: peers on this machine train a model; one is killed in the middle of an all-reduce, another joins later.

`command` is the command line, `driver` starts the peers and strikes, `worker` is what a peer runs, with `model` and `data`; `history`
keeps what happened, `screen`, `report` and `plot` show it.
"""
