"""Imported first by the fork server of workers.py, which is started with Ctrl-C blocked: until its other imports are
done, seconds later, Ctrl-C ends it without a traceback."""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
