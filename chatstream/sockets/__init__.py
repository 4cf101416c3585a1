"""What waits on sockets, in the loop's thread: never blocks, logs, or takes a lock gevent patches.

Begin in `loop`, the one native thread. `client` is a client's socket, watched; `handle` one that
any thread can shut down; `liveness` finds peers that vanish; `framing` reads HTTP/1.1 bodies
(pure); `native` gives locks, threads and epoll as the kernel has them, also under gevent.
"""
