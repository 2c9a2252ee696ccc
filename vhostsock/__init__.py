"""vhostsock: vhost-user device back-ends in Python, and a socket-offload device for QEMU guests."""
