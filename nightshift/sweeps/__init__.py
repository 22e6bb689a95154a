"""Many runs over some fields of the config, compared with each other while they train.

`space` says what may be tried, `stored` what was asked so far and how it went, and `study` what to ask next and which
trials to stop early. A sweep that is killed at any instant goes on with the same trials when it is started again.
"""
