"""Makes a process of a soak one that a signal can strike as no machine here does: Python imports this by itself.

SIGUSR1 hangs the main thread for ever, while the others, that of the heartbeat too, go on. SIGUSR2 fails the device, as
the loop learns of it: where it reads what a step computed. An exception of the handler itself might be swallowed.
"""

import signal
import time


def hang(number, frame):
    time.sleep(10**9)


def fail_device(number, frame):
    import jax

    from parallax.training import loop

    def observe(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: the device halted, as a soak asked it to")

    loop._observe = observe


signal.signal(signal.SIGUSR1, hang)
signal.signal(signal.SIGUSR2, fail_device)
