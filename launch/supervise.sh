#!/bin/sh
# Keeps a command going on one machine: supervise.sh FOLDER COMMAND...
#
# 0 (finished), 1 (it failed, and would again) and 2 (a mistake in the command or config) end it.
# Every other code starts it again, and it goes on from its last checkpoint: 128 + a signal is a
# preemption or a peer that died, 75 a run that another process still has.
folder=$1
shift
mkdir -p "$folder" || exit 1
exec 9>"$folder/lock"
if ! flock -n 9; then
    echo "running already"
    exit 0
fi
rm -f "$folder/exit_code"
while true; do
    "$@" >>"$folder/log" 2>&1 9>&-
    code=$?
    case $code in 0 | 1 | 2) break ;; esac
    echo "exit code $code: started again" >>"$folder/log"
    sleep "${RESTART_SECONDS:-10}"
done
echo "$code" >"$folder/exit_code"
exit "$code"
