"""Our engine beside others on the same file, in one interleaved run: `task` what is timed, `peers/` who can, `worker` and `process` a process for each,
`rounds` the order, `models` the files, `tables` what is shown and recorded. `tradespace bench` and `lab run cpu-speed` are thin over it."""
