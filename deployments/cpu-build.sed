# What requirements.lock is for UV_TORCH_BACKEND=cpu, in Makefile and Dockerfile. An entry of the lock ends with the first
# line that does not end in a backslash.
# A CPU build needs none of these.
/^(cuda|nvidia|triton)/,/[^\]$/d
# These two then come from PyTorch's own index as other files, whose hashes the lock does not know. All others are
# checked as ever.
/^torch(vision)?==/,/[^\]$/{
  /--hash/d
  s/ \\$//
}
