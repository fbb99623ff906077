# Runs inside new namespaces, for the tests of both SDKs: makes the view of `STATE` and starts the agent, which must not
# become process 1, because then it would take itself for the init of a guest. Whatever the tests leave behind ends with the
# process namespace.
set -eu
mount --bind "$STATE/passwd" /etc/passwd
mount --bind "$STATE/group" /etc/group
mount --bind "$STATE/home" /home
"$ENVD" agent --listen 127.0.0.1:0 --user user &
wait
