"""For all tests."""

import signal

# A shell starts what it puts into the background with SIGINT ignored, and children inherit that. Tests of Ctrl-C
# mean something only where it is not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
