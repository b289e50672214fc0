# Completion of pgcoord in fish.
# Written by docs/generate.py from the command tree. Change the commands and run it again.

function __pgcoord_is_command
    contains -- "$argv" \
        'pgcoord migrate' \
        'pgcoord migrate up' \
        'pgcoord migrate status' \
        'pgcoord migrate sql' \
        'pgcoord migrate verify' \
        'pgcoord migrate grant' \
        'pgcoord leader' \
        'pgcoord leader run' \
        'pgcoord leader status' \
        'pgcoord leader wait' \
        'pgcoord leader step-down' \
        'pgcoord leader history' \
        'pgcoord leader assert' \
        'pgcoord kv' \
        'pgcoord kv get' \
        'pgcoord kv set' \
        'pgcoord kv clear' \
        'pgcoord kv clear-range' \
        'pgcoord kv add' \
        'pgcoord kv watch' \
        'pgcoord kv txn' \
        'pgcoord kv load' \
        'pgcoord kv export' \
        'pgcoord kv range' \
        'pgcoord commit' \
        'pgcoord commit list' \
        'pgcoord commit show' \
        'pgcoord commit explain' \
        'pgcoord flow' \
        'pgcoord flow create' \
        'pgcoord flow show' \
        'pgcoord flow list' \
        'pgcoord flow cancel' \
        'pgcoord execution' \
        'pgcoord execution claim' \
        'pgcoord execution renew' \
        'pgcoord execution complete' \
        'pgcoord execution fail' \
        'pgcoord execution revoke' \
        'pgcoord execution show' \
        'pgcoord worker' \
        'pgcoord worker run' \
        'pgcoord reconcile' \
        'pgcoord tail' \
        'pgcoord tail lease' \
        'pgcoord tail completion' \
        'pgcoord lock' \
        'pgcoord lock run' \
        'pgcoord lock list' \
        'pgcoord lock who' \
        'pgcoord lock break' \
        'pgcoord subscription' \
        'pgcoord subscription list' \
        'pgcoord subscription show' \
        'pgcoord subscription set' \
        'pgcoord subscription reset' \
        'pgcoord gc' \
        'pgcoord gc commit-requests' \
        'pgcoord gc lease-events' \
        'pgcoord gc completion-events' \
        'pgcoord gc all' \
        'pgcoord dev' \
        'pgcoord dev up' \
        'pgcoord dev down' \
        'pgcoord dev dsn' \
        'pgcoord dev status' \
        'pgcoord bench' \
        'pgcoord demo'
end

function __pgcoord_takes_value
    contains -- "$argv" \
        '--dsn' \
        '--schema' \
        '-o' \
        '--output' \
        '--color' \
        '--log-format' \
        'pgcoord migrate up --to' \
        'pgcoord migrate up --lock-timeout' \
        'pgcoord migrate sql --to' \
        'pgcoord migrate grant --reader' \
        'pgcoord migrate grant --client' \
        'pgcoord migrate grant --operator' \
        'pgcoord leader run --node-id' \
        'pgcoord leader run --ttl' \
        'pgcoord leader run --with' \
        'pgcoord leader status --interval' \
        'pgcoord leader wait --timeout' \
        'pgcoord leader step-down --timeout' \
        'pgcoord leader history --since' \
        'pgcoord leader history --limit' \
        'pgcoord leader assert --epoch' \
        'pgcoord kv get --at' \
        'pgcoord kv set --value-file' \
        'pgcoord kv set --timeout' \
        'pgcoord kv clear --prefix' \
        'pgcoord kv clear --timeout' \
        'pgcoord kv clear-range --timeout' \
        'pgcoord kv add --timeout' \
        'pgcoord kv watch --prefix' \
        'pgcoord kv watch --max' \
        'pgcoord kv watch --timeout' \
        'pgcoord kv watch --attempts' \
        'pgcoord kv txn --timeout' \
        'pgcoord kv load --batch-size' \
        'pgcoord kv load --timeout' \
        'pgcoord kv export --prefix' \
        'pgcoord kv range --prefix' \
        'pgcoord kv range --limit' \
        'pgcoord commit list --status' \
        'pgcoord commit list --limit' \
        'pgcoord commit explain --since' \
        'pgcoord commit explain --limit' \
        'pgcoord flow show --format' \
        'pgcoord flow list --namespace' \
        'pgcoord flow list --limit' \
        'pgcoord execution claim --owner' \
        'pgcoord execution claim --lease' \
        'pgcoord execution claim --namespace' \
        'pgcoord execution claim --instance-tag' \
        'pgcoord execution renew --epoch' \
        'pgcoord execution renew --lease' \
        'pgcoord execution complete --epoch' \
        'pgcoord execution fail --epoch' \
        'pgcoord execution fail --reason' \
        'pgcoord worker run --concurrency' \
        'pgcoord worker run --lease' \
        'pgcoord worker run --owner' \
        'pgcoord worker run --namespace' \
        'pgcoord worker run --instance-tag' \
        'pgcoord reconcile --batch-limit' \
        'pgcoord reconcile --stale-threshold-ms' \
        'pgcoord reconcile --namespace' \
        'pgcoord reconcile --instance-tag' \
        'pgcoord reconcile --interval' \
        'pgcoord reconcile --retry' \
        'pgcoord tail lease --from' \
        'pgcoord tail lease --since' \
        'pgcoord tail lease --until' \
        'pgcoord tail lease --max' \
        'pgcoord tail lease --partition' \
        'pgcoord tail lease --namespace' \
        'pgcoord tail lease --instance-tag' \
        'pgcoord tail lease --event-type' \
        'pgcoord tail lease --cursor-file' \
        'pgcoord tail lease --subscription' \
        'pgcoord tail lease --max-lag' \
        'pgcoord tail lease --batch' \
        'pgcoord tail lease --attempts' \
        'pgcoord tail completion --from' \
        'pgcoord tail completion --since' \
        'pgcoord tail completion --until' \
        'pgcoord tail completion --max' \
        'pgcoord tail completion --partition' \
        'pgcoord tail completion --namespace' \
        'pgcoord tail completion --instance-tag' \
        'pgcoord tail completion --outcome' \
        'pgcoord tail completion --cursor-file' \
        'pgcoord tail completion --subscription' \
        'pgcoord tail completion --max-lag' \
        'pgcoord tail completion --batch' \
        'pgcoord tail completion --attempts' \
        'pgcoord lock run --wait' \
        'pgcoord lock run --conflict-exit-code' \
        'pgcoord lock run --kill-grace' \
        'pgcoord gc commit-requests --older-than' \
        'pgcoord gc commit-requests --batch-size' \
        'pgcoord gc commit-requests --max-runtime' \
        'pgcoord gc lease-events --older-than' \
        'pgcoord gc lease-events --batch-size' \
        'pgcoord gc lease-events --max-runtime' \
        'pgcoord gc completion-events --older-than' \
        'pgcoord gc completion-events --batch-size' \
        'pgcoord gc completion-events --max-runtime' \
        'pgcoord gc all --older-than' \
        'pgcoord gc all --batch-size' \
        'pgcoord gc all --max-runtime' \
        'pgcoord dev up --name' \
        'pgcoord dev up --server-version' \
        'pgcoord dev down --name' \
        'pgcoord dev dsn --name' \
        'pgcoord dev status --name' \
        'pgcoord bench --duration' \
        'pgcoord bench --in-flight' \
        'pgcoord bench --keys'
end

# True if the words before the cursor name the command $argv[1] and the cursor is at its argument number $argv[2].
# Without a number, at any argument; with a third word, at that argument or a later one.
function __pgcoord_at
    set -l path pgcoord
    set -l position 1
    set -l awaited
    set -l plain
    set -l words (commandline -opc)
    set -e words[1]
    for word in $words
        if set -q awaited[1]
            set -e awaited
        else if set -q plain[1]
            set position (math $position + 1)
        else if test "$word" = --
            set plain yes
        else if string match -q -- '-*' "$word"
            __pgcoord_takes_value $word; or __pgcoord_takes_value "$path $word"; and set awaited yes
        else if __pgcoord_is_command "$path $word"
            set path "$path $word"
            set position 1
        else
            set position (math $position + 1)
        end
    end
    test "$path" = "$argv[1]"; or return 1
    set -q argv[2]; or return 0
    test $position -eq $argv[2]; and return 0
    set -q argv[3]; and test $position -gt $argv[2]
end

complete -c pgcoord -f
complete -c pgcoord -l dsn -r -f -d 'Connection string, URI or keywords. [PGCOORD_DSN, then libpq\'s own]'
complete -c pgcoord -l schema -r -f -d 'Schema that holds the cluster. [PGCOORD_SCHEMA, then pgcoord]'
complete -c pgcoord -s o -l output -r -f -a 'table plain json jsonl csv markdown' -d 'table, plain, json, jsonl, csv, markdown. [PGCOORD_OUTPUT, then table]'
complete -c pgcoord -s q -l quiet -d 'Write only warnings and errors to stderr.'
complete -c pgcoord -s v -l verbose -d 'Write details to stderr.'
complete -c pgcoord -l color -r -f -a 'auto always never' -d 'auto, always or never. [PGCOORD_COLOR, then auto]'
complete -c pgcoord -l log-format -r -f -a 'text json' -d 'How log lines on stderr are written. [PGCOORD_LOG_FORMAT, then text]'
complete -c pgcoord -l version -d 'Print the version and exit.'
complete -c pgcoord -s h -l help -d 'Show this message and exit.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'migrate' -d 'Apply, list and check the migrations of the schema, and grant rights on it.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'leader' -d 'Run candidates for the leader, and inspect the elected one.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'kv' -d 'Read and write the transactional key-value data.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'commit' -d 'Show commit requests and their outcomes.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'flow' -d 'Create, show and cancel flows: graphs of executions that depend on each other.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'execution' -d 'Claim executions, renew their leases, and end them.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'worker' -d 'Run commands for executions as they become eligible.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'reconcile' -d 'Dispatch events, end leases and cancel executions that crashes left behind.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'tail' -d 'Follow an event outbox from a cursor on, without missing an event.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'lock' -d 'Run a command under a lock, and show or break locks.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'subscription' -d 'Show and set the checkpoints of subscriptions.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'gc' -d 'Delete settled commit requests and old events that are no longer needed.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'dev' -d 'Run a development PostgreSQL server.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'bench' -d 'Measure the commit rate and latency of this database.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'demo' -d 'Show commits, failover and flows on a temporary PostgreSQL server.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate'" -a 'up' -d 'Apply the migrations that the schema lacks, each in its own transaction.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate'" -a 'status' -d 'List the migrations and their states: applied, pending, edited, unknown, breaking.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate'" -a 'sql' -d 'Print the migrations as a psql script, for DDL that is run by hand.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate'" -a 'verify' -d 'Compare the applied migrations with those of this program: equal checksums, and no unknown breaking one.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate'" -a 'grant' -d 'Grant existing roles the rights that their work needs.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate up'" -l to -r -f -d 'Stop after migration N.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate up'" -l dry-run -d 'List the migrations that would be applied; change nothing.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate up'" -l lock-timeout -r -f -d 'How long to wait for another migration run.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate status'" -l check -d 'Exit 3 if migrations are pending.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate sql'" -l to -r -f -d 'Stop after migration N.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate grant'" -l reader -r -f -d 'May run status commands, lists and tails.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate grant'" -l client -r -f -d 'May also read data, commit, and insert events.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate grant'" -l operator -r -f -d 'May also run leaders, reconcile and collect garbage.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate grant'" -l dry-run -d 'Print the GRANT statements; change nothing.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader'" -a 'run' -d 'Stand for election, and resolve commit requests while elected.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader'" -a 'status' -d 'Show the leader, the durable version and the queue; exit 3 if there is no leader or the queue does not advance.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader'" -a 'wait' -d 'Wait until there is a leader, and print its epoch and address; return at once if there is one.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader'" -a 'step-down' -d 'Ask the leader to finish its batch and release the lease.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader'" -a 'history' -d 'List the terms of leaders, newest first: when and why each ended, and the versions that it committed.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader'" -a 'assert' -d 'Exit 0 if the leader has this epoch, else 6: a fence for scripts.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader run'" -l node-id -r -f -d 'Name of this candidate. [default: host and pid]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader run'" -l ttl -r -f -d 'Time to live of the lease without renewal; at least 1s.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader run'" -l with -r -f -a 'dispatch' -d 'Work that this process does besides: dispatch completion events.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader status'" -s w -l watch -d 'Repeat until Ctrl-C.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader status'" -l interval -r -f -d 'With --watch: longest time between two documents.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader wait'" -l timeout -r -f -d 'Exit 124 after this time.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader step-down'" -l wait -d 'Wait until the next leader is elected.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader step-down'" -l timeout -r -f -d 'Exit 124 after this time.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader history'" -l since -r -f -d 'Only terms that had not ended this long ago.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader history'" -l limit -r -f -d 'Most rows to list.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader assert'" -l epoch -r -f -d 'The expected epoch of the leader.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv'" -a 'get' -d 'Print the value of a key; exit 3 if there is no such key.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv'" -a 'set' -d 'Set a key, and print the commit version.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv'" -a 'clear' -d 'Clear a key, and print the commit version; with --prefix, clear all keys that begin with P in one transaction.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv'" -a 'clear-range' -d 'Clear every key from BEGIN up to, but not including, END.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv'" -a 'add' -d 'Add to a counter, a little-endian integer of eight bytes, without reading it: additions never conflict.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv'" -a 'watch' -d 'Print the present value of a key, and each change from then on; a value of null says that there is no such key.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv'" -a 'txn' -d 'Compare keys and, if every comparison is true, make all mutations at once; exit 3 if one is false.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv'" -a 'load' -d 'Set many keys from a file of JSON lines: {"key": …, "value": …, "encoding": "utf-8" or "hex"}.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv'" -a 'export' -d 'Print keys and values as JSON lines, all from one snapshot.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv'" -a 'range' -d 'List keys and values from BEGIN up to, but not including, END, all from one snapshot.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv get'" -l hex -d 'Read and print keys and values as hexadecimal.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv get'" -l integer -d 'Print the value as a little-endian integer.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv get'" -l raw -d 'Write the bytes of the value and nothing else.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv get'" -l at -r -f -d 'The value at a version of the last seconds.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv set'" -l value-file -r -F -d 'Read the value from a file, in place of VALUE.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv set'" -l hex -d 'Read and print keys and values as hexadecimal.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv set'" -l timeout -r -f -d 'How long to wait for a leader, and for the commit to be settled.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv clear'" -l prefix -r -f -d 'Clear all keys that begin with P, in place of KEY.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv clear'" -s y -l yes -d 'With --prefix: clear without confirmation.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv clear'" -l hex -d 'Read and print keys and values as hexadecimal.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv clear'" -l timeout -r -f -d 'How long to wait for a leader, and for the commit to be settled.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv clear-range'" -l hex -d 'Read and print keys and values as hexadecimal.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv clear-range'" -l timeout -r -f -d 'How long to wait for a leader, and for the commit to be settled.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv add'" -l hex -d 'Read and print keys and values as hexadecimal.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv add'" -l timeout -r -f -d 'How long to wait for a leader, and for the commit to be settled.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv watch'" -l prefix -r -f -d 'Watch all keys that begin with P, in place of KEY.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv watch'" -l changes-only -d 'Leave out the present state; start with the first change after it.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv watch'" -l max -r -f -d 'End after N records.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv watch'" -l timeout -r -f -d 'End after this time, with exit code 124.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv watch'" -l attempts -r -f -d 'With CMD: exit after N failed runs in a row. [default: no limit]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv watch'" -l hex -d 'Read and print keys and values as hexadecimal.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv txn' 1" -F
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv txn'" -l timeout -r -f -d 'How long to wait for a leader, and for the commit to be settled.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv load' 1" -F
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv load'" -l batch-size -r -f -d 'Keys per transaction.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv load'" -l timeout -r -f -d 'How long to wait for a leader, and for the commit to be settled.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv export'" -l prefix -r -f -d 'All keys that begin with P, in place of BEGIN and END.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv export'" -l hex -d 'Read and print keys and values as hexadecimal.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv range'" -l prefix -r -f -d 'All keys that begin with P, in place of BEGIN and END.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv range'" -l limit -r -f -d 'Most rows to list.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv range'" -l reverse -d 'Start at the last key, in reverse order.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv range'" -l hex -d 'Read and print keys and values as hexadecimal.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord commit'" -a 'list' -d 'List commit requests, newest first.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord commit'" -a 'show' -d 'Show the outcome of one request; exit 3 if it is not stored.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord commit'" -a 'explain' -d 'Show what a request read and wrote, its outcome, and the commit that it conflicted with.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord commit list'" -l status -r -f -d 'Only requests with this status: pending, committed, conflict, too_old, rejected, orphaned.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord commit list'" -l limit -r -f -d 'Most rows to list.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord commit explain'" -l hot -d 'List the keys over which the most requests conflicted.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord commit explain'" -l since -r -f -d 'With --hot: only requests of this last time.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord commit explain'" -l limit -r -f -d 'Most rows to list.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord flow'" -a 'create' -d 'Create a flow from a file: executions, the edges between them, and their join policies.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord flow'" -a 'show' -d 'Draw a flow with the states of its executions.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord flow'" -a 'list' -d 'List flows, newest first, with the numbers of their executions, unfinished and failed.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord flow'" -a 'cancel' -d 'Cancel the executions of a flow that have not ended; workers stop their commands at the next renewal.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord flow create' 1" -F
complete -c pgcoord -n "__pgcoord_at 'pgcoord flow create'" -l check -d 'Only check the file; needs no database.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord flow show'" -l format -r -f -a 'tree mermaid dot json' -d 'Format of the drawing.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord flow list'" -l namespace -r -f -d 'Only of this namespace.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord flow list'" -l limit -r -f -d 'Most rows to list.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution'" -a 'claim' -d 'Lease the oldest eligible execution; exit 3 if there is none.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution'" -a 'renew' -d 'Renew a lease from now on; exit 6 if it was lost.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution'" -a 'complete' -d 'End an execution as a success; exit 6 and change nothing if the lease was lost.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution'" -a 'fail' -d 'End an attempt as a failure; exit 6 and change nothing if the lease was lost.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution'" -a 'revoke' -d 'Revoke the lease of a running execution, which becomes eligible again; exit 3 if it is not running.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution'" -a 'show' -d 'Show one execution and its lease; exit 3 if there is no such execution.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution claim'" -l owner -r -f -d 'Owner of the lease. [default: host and pid]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution claim'" -l lease -r -f -d 'Time to live of the lease.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution claim'" -l namespace -r -f -d 'Only of this namespace.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution claim'" -l instance-tag -r -f -d 'Only with this tag.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution renew'" -l epoch -r -f -d 'The lease_epoch that execution claim printed.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution renew'" -l lease -r -f -d 'Time to live of the lease.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution complete'" -l epoch -r -f -d 'The lease_epoch that execution claim printed.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution fail'" -l epoch -r -f -d 'The lease_epoch that execution claim printed.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution fail'" -l reason -r -f -d 'Reason, shown with the execution.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord worker'" -a 'run' -d 'Claim executions, run a command for each while renewing its lease, and end them by its exit status.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord worker run'" -l once -d 'Exit when no execution is eligible or in backoff.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord worker run'" -l concurrency -r -f -d 'Concurrent commands.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord worker run'" -l lease -r -f -d 'Time to live of a lease without renewal; at least 1s.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord worker run'" -l owner -r -f -d 'Owner of the leases. [default: host and pid]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord worker run'" -l namespace -r -f -d 'Only of this namespace.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord worker run'" -l instance-tag -r -f -d 'Only with this tag.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord reconcile' 1" -f -a 'dependency lease-expiry sibling-cancel orphaned-commits all'
complete -c pgcoord -n "__pgcoord_at 'pgcoord reconcile'" -l batch-limit -r -f -d 'Rows per tick.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord reconcile'" -l stale-threshold-ms -r -f -d 'Age from which an event is dispatched, in milliseconds.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord reconcile'" -l namespace -r -f -d 'Only of this namespace.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord reconcile'" -l instance-tag -r -f -d 'Only with this tag.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord reconcile'" -l drain -d 'Repeat until a tick changes nothing.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord reconcile'" -l loop -d 'Repeat until Ctrl-C or SIGTERM.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord reconcile'" -l interval -r -f -d 'With --loop: pause between two ticks.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord reconcile'" -l list-quarantined -d 'Only list the quarantined events.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord reconcile'" -l retry -r -f -a 'all' -d 'Only release quarantined events, to be dispatched again.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail'" -a 'lease' -d 'Follow the lease events: acquired, renewed, expired, reclaimed, revoked.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail'" -a 'completion' -d 'Follow the completion events: success, failed, cancelled, skipped.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l from -r -f -d 'Start after this cursor. [default: from now on]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l from-start -d 'Start at the oldest event that is stored.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l since -r -f -d 'Start at the first event inserted this long ago (10m) or at this time.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l until -r -f -d 'End with the events inserted before this time (at most now), or at this cursor.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l max -r -f -d 'End after N events.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l no-follow -d 'End when all stored events have been printed.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l partition -r -f -d 'Only these; repeatable.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l namespace -r -f -d 'Only these; repeatable.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l instance-tag -r -f -d 'Only these; repeatable.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l event-type -r -f -d 'Only these; repeatable.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l cursor-file -r -F -d 'Resume from the cursor in FILE, and save it there. FILE is a regular file, used by one tail at a time.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l subscription -r -f -d 'Resume from the checkpoint NAME in the database, and save it there.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l lag -d 'Only print the number of events after the given cursor.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l max-lag -r -f -d 'With --lag: exit 3 if there are more events.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l exec -d 'Run CMD for each event, which is on its stdin; exit code 0 moves the position.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l batch -r -f -d 'With --exec: at most N events for each run.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l attempts -r -f -d 'With --exec: exit after N failed runs in a row. [default: no limit]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l from -r -f -d 'Start after this cursor. [default: from now on]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l from-start -d 'Start at the oldest event that is stored.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l since -r -f -d 'Start at the first event inserted this long ago (10m) or at this time.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l until -r -f -d 'End with the events inserted before this time (at most now), or at this cursor.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l max -r -f -d 'End after N events.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l no-follow -d 'End when all stored events have been printed.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l partition -r -f -d 'Only these; repeatable.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l namespace -r -f -d 'Only these; repeatable.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l instance-tag -r -f -d 'Only these; repeatable.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l outcome -r -f -d 'Only these; repeatable.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l cursor-file -r -F -d 'Resume from the cursor in FILE, and save it there. FILE is a regular file, used by one tail at a time.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l subscription -r -f -d 'Resume from the checkpoint NAME in the database, and save it there.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l lag -d 'Only print the number of events after the given cursor.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l max-lag -r -f -d 'With --lag: exit 3 if there are more events.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l exec -d 'Run CMD for each event, which is on its stdin; exit code 0 moves the position.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l batch -r -f -d 'With --exec: at most N events for each run.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l attempts -r -f -d 'With --exec: exit after N failed runs in a row. [default: no limit]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord lock'" -a 'run' -d 'Run a command while holding a lock, so that at most one runs at a time, across machines.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord lock'" -a 'list' -d 'List the sessions that hold locks, and those that wait for them.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord lock'" -a 'who' -d 'Show the session that holds a lock; exit 3 if none does.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord lock'" -a 'break' -d 'Terminate the session that holds a lock, which releases the lock; exit 3 if no session holds it.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord lock run'" -l wait -r -f -d 'How long to wait for the lock. [default: no wait]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord lock run'" -l conflict-exit-code -r -f -d 'Exit code if another session holds the lock.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord lock run'" -l kill-grace -r -f -d 'Time from SIGTERM to SIGKILL when the lock is lost.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord lock run'" -l fence -d 'Pass a fence in PGCOORD_FENCE, a number that grows with every acquisition.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord lock break'" -s y -l yes -d 'Terminate the session without confirmation.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord subscription'" -a 'list' -d 'List subscriptions: their positions, and the number of events of the outbox after each.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord subscription'" -a 'show' -d 'Show one subscription and its owner; exit 3 if there is no such subscription.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord subscription'" -a 'set' -d 'Move a checkpoint; exit 5 if a session owns the subscription.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord subscription'" -a 'reset' -d 'Delete the checkpoint of a subscription: the next tail starts anew, and garbage collection ignores it.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord subscription set'" -l force -d 'Allow a move backwards, which delivers events again.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord subscription reset'" -l force -d 'Required: a reset cannot be undone.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc'" -a 'commit-requests' -d 'Delete settled commit requests that are older than the retention.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc'" -a 'lease-events' -d 'Delete lease events that are older than the retention and that every subscription has passed.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc'" -a 'completion-events' -d 'Delete dispatched completion events that are older than the retention and that every subscription has passed.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc'" -a 'all' -d 'Delete settled commit requests, lease events and completion events.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc commit-requests'" -l older-than -r -f -d 'Retention; at least 60s. [default: 10m]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc commit-requests'" -l batch-size -r -f -d 'Rows per transaction.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc commit-requests'" -l max-runtime -r -f -d 'For each table, start no batch after this time.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc commit-requests'" -l dry-run -d 'Count the rows that would be deleted; change nothing.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc lease-events'" -l older-than -r -f -d 'Retention; at least 60s. [default: 1d]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc lease-events'" -l batch-size -r -f -d 'Rows per transaction.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc lease-events'" -l max-runtime -r -f -d 'For each table, start no batch after this time.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc lease-events'" -l dry-run -d 'Count the rows that would be deleted; change nothing.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc completion-events'" -l older-than -r -f -d 'Retention; at least 60s. [default: 1d]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc completion-events'" -l batch-size -r -f -d 'Rows per transaction.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc completion-events'" -l max-runtime -r -f -d 'For each table, start no batch after this time.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc completion-events'" -l dry-run -d 'Count the rows that would be deleted; change nothing.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc all'" -l older-than -r -f -d 'Retention; at least 60s. [default: requests 10m, events 1d]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc all'" -l batch-size -r -f -d 'Rows per transaction.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc all'" -l max-runtime -r -f -d 'For each table, start no batch after this time.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc all'" -l dry-run -d 'Count the rows that would be deleted; change nothing.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev'" -a 'up' -d 'Start the development server, creating it at the first call, and apply the migrations that it lacks.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev'" -a 'down' -d 'Stop the development server, and keep its data unless --destroy is given.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev'" -a 'dsn' -d 'Print the DSN of the development server; exit 3 if it is not running.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev'" -a 'status' -d 'Show whether the development server is running, and its paths; exit 3 if it is not.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev up'" -l name -r -f -d 'Name of the server; demo --keep creates \'demo\'.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev up'" -l server-version -r -f -d 'PostgreSQL 15, 16 or 18. [default: that of the data, else the newest]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev up'" -l no-migrate -d 'Do not apply migrations.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev down'" -l name -r -f -d 'Name of the server; demo --keep creates \'demo\'.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev down'" -l destroy -d 'Delete the data as well.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev down'" -l yes -d 'Delete without confirmation.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev dsn'" -l name -r -f -d 'Name of the server; demo --keep creates \'demo\'.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev status'" -l name -r -f -d 'Name of the server; demo --keep creates \'demo\'.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord bench'" -l duration -r -f -d 'Length of the measurement.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord bench'" -l in-flight -r -f -d 'Concurrent transactions.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord bench'" -l keys -r -f -d 'Number of keys to choose from.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord demo'" -l keep -d 'Keep the server running, and print commands to try on it.'
