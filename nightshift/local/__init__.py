"""The servers that nightshift starts on this machine for those who have none: S3 (`s3`) and Prefect (`prefect`).

A server starts at its first use and is shared by all processes that use it. It is started again if it dies, and stops
some seconds after its last user has ended, however that one ended (`supervisor`). Its data stays.
"""
