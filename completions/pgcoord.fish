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
        'pgcoord kv set --timeout' \
        'pgcoord kv clear --timeout' \
        'pgcoord kv clear-range --timeout' \
        'pgcoord kv add --timeout' \
        'pgcoord kv load --batch-size' \
        'pgcoord kv load --timeout' \
        'pgcoord kv range --limit' \
        'pgcoord commit list --status' \
        'pgcoord commit list --limit' \
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

# Whether the words before the cursor name the command $argv[1], with the cursor at its argument number $argv[2].
# Without a number, at any; with a third word, at that one or a later one.
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
complete -c pgcoord -s q -l quiet -d 'No talk on stderr unless something is wrong.'
complete -c pgcoord -s v -l verbose -d 'Say more on stderr.'
complete -c pgcoord -l color -r -f -a 'auto always never' -d 'auto, always or never. [PGCOORD_COLOR, then auto]'
complete -c pgcoord -l log-format -r -f -a 'text json' -d 'How log lines on stderr are written. [PGCOORD_LOG_FORMAT, then text]'
complete -c pgcoord -l version -d 'Print the version and exit.'
complete -c pgcoord -s h -l help -d 'Show this message and exit.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'migrate' -d 'Bring the schema up to date, and say whether it is.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'leader' -d 'Run, inspect and watch the elected leader.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'kv' -d 'Read and write the transactional key-value data.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'commit' -d 'Look at commit requests and what became of them.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'flow' -d 'Create, show and cancel flows: executions that wait for each other.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'execution' -d 'Claim executions, keep their leases, end them.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'worker' -d 'Run commands for executions as they become eligible.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'reconcile' -d 'Repair what crashes left behind.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'tail' -d 'Follow the event outboxes from a cursor on, without missing an event.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'lock' -d 'Run a command while holding a lock, and see who holds which.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'subscription' -d 'Look at the checkpoints of subscriptions, and set them.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'gc' -d 'Collect garbage: settled requests and old events that nobody can ask for any more.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'dev' -d 'Keep a PostgreSQL of your own to try things on.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'bench' -d 'Measure how many commits a second this database does.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord'" -a 'demo' -d 'Show the whole thing at work on a throw-away PostgreSQL.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate'" -a 'up' -d 'Apply the migrations that this database lacks, each in a transaction of its own.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate'" -a 'status' -d 'List every migration and whether this database has had it.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate'" -a 'sql' -d 'Print the migrations as a psql script, for those who run DDL by hand.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate'" -a 'verify' -d 'Check what was applied against what this program carries: equal checksums, nothing unknown that is breaking.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate'" -a 'grant' -d 'Give existing roles just the rights that their work needs.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate up'" -l to -r -f -d 'Stop after migration N.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate up'" -l dry-run -d 'Say what would be applied; change nothing.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate up'" -l lock-timeout -r -f -d 'How long to wait for another run.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate status'" -l check -d 'Exit 3 unless everything is applied.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate sql'" -l to -r -f -d 'Stop after migration N.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate grant'" -l reader -r -f -d 'May look: status, listings, tails.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate grant'" -l client -r -f -d 'May read data and submit commits.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate grant'" -l operator -r -f -d 'May lead, repair and collect garbage.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord migrate grant'" -l dry-run -d 'Print the statements; change nothing.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader'" -a 'run' -d 'Stand for election, and while elected resolve commit requests.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader'" -a 'status' -d 'Say who leads, how far the data has got and how long the queue is; exit 3 when nobody leads or the queue does not advance.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader'" -a 'wait' -d 'Wait until somebody leads, and say who; returns at once when somebody does.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader'" -a 'step-down' -d 'Ask the leader to finish its batch and let another lead.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader'" -a 'history' -d 'List who led when, how it ended, and which versions were committed, newest first.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader'" -a 'assert' -d 'Exit 0 if this epoch leads, and 6 if it does not: a fence for scripts.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader run'" -l node-id -r -f -d 'Name of this candidate. [default: host and pid]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader run'" -l ttl -r -f -d 'How long the lease lasts unrenewed; at least 1s.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader run'" -l with -r -f -a 'dispatch' -d 'What else this process does: carry completions on.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader status'" -s w -l watch -d 'Show it again and again until Ctrl-C.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader status'" -l interval -r -f -d 'With --watch: longest time between two looks.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader wait'" -l timeout -r -f -d 'Give up after that long, with exit 124.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader step-down'" -l wait -d 'Wait until the next leader is elected.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader step-down'" -l timeout -r -f -d 'Give up after that long, with exit 124.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader history'" -l since -r -f -d 'Only what was not over that long ago.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader history'" -l limit -r -f -d 'At most so many.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord leader assert'" -l epoch -r -f -d 'The epoch that has to lead.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv'" -a 'get' -d 'Print what a key holds; exit 3 when there is no such key.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv'" -a 'set' -d 'Write a key, and print the version at which that took effect.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv'" -a 'clear' -d 'Remove a key, and print the version at which that took effect.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv'" -a 'clear-range' -d 'Remove every key from BEGIN up to but without END.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv'" -a 'add' -d 'Add to a counter, a little-endian number of eight bytes, without reading it: additions never conflict.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv'" -a 'load' -d 'Write many keys from a file of JSON lines: {"key": …, "value": …, "encoding": "utf-8" or "hex"}.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv'" -a 'export' -d 'Write keys and values as JSON lines, all of one snapshot, whatever their number.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv'" -a 'range' -d 'List keys and values from BEGIN up to but without END, all of one snapshot.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv get'" -l hex -d 'Keys and values are hexadecimal, in and out.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv get'" -l integer -d 'Show the value as a little-endian number.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv set'" -l hex -d 'Keys and values are hexadecimal, in and out.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv set'" -l timeout -r -f -d 'How long to wait for a leader, and for the commit.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv clear'" -l hex -d 'Keys and values are hexadecimal, in and out.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv clear'" -l timeout -r -f -d 'How long to wait for a leader, and for the commit.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv clear-range'" -l hex -d 'Keys and values are hexadecimal, in and out.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv clear-range'" -l timeout -r -f -d 'How long to wait for a leader, and for the commit.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv add'" -l hex -d 'Keys and values are hexadecimal, in and out.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv add'" -l timeout -r -f -d 'How long to wait for a leader, and for the commit.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv load' 1" -F
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv load'" -l batch-size -r -f -d 'Keys a transaction.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv load'" -l timeout -r -f -d 'How long to wait for a leader, and for the commit.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv export'" -l hex -d 'Keys and values are hexadecimal, in and out.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv range'" -l limit -r -f -d 'At most so many.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv range'" -l reverse -d 'From the end backwards.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord kv range'" -l hex -d 'Keys and values are hexadecimal, in and out.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord commit'" -a 'list' -d 'List commit requests, newest first.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord commit'" -a 'show' -d 'Say what became of one request; exit 3 when it is not there.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord commit'" -a 'explain' -d 'Say what a request read and wrote, when what happened to it, and which commit it lost to.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord commit list'" -l status -r -f -d 'Only one of: pending, committed, conflict, too_old, rejected, orphaned.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord commit list'" -l limit -r -f -d 'At most so many.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord flow'" -a 'create' -d 'Create a flow from a file: executions, edges between them, a policy for each that waits.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord flow'" -a 'show' -d 'Draw a flow with the states of its executions.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord flow'" -a 'list' -d 'List flows, newest first, with how many of their executions are unfinished or failed.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord flow'" -a 'cancel' -d 'Cancel whatever of a flow has not ended.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord flow create' 1" -F
complete -c pgcoord -n "__pgcoord_at 'pgcoord flow create'" -l check -d 'Only say whether the file is right.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord flow show'" -l format -r -f -a 'tree mermaid dot json' -d 'How to draw it.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord flow list'" -l namespace -r -f -d 'Only of this namespace.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord flow list'" -l limit -r -f -d 'At most so many.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution'" -a 'claim' -d 'Lease the oldest eligible execution; exit 3 when there is none.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution'" -a 'renew' -d 'Prolong a lease from now on; exit 6 when it is over.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution'" -a 'complete' -d 'End an execution as a success; exit 6, and nothing changed, when the lease is over.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution'" -a 'fail' -d 'End an attempt as a failure: eligible again after a back-off, or failed if it was the last; exit 6 as above.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution'" -a 'revoke' -d 'Take a running execution away from its worker, for another to run; exit 3 when it is not running.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution'" -a 'show' -d 'Show one execution, and who runs it; exit 3 when there is none.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution claim'" -l owner -r -f -d 'Who is going to do it. [default: host and pid]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution claim'" -l lease -r -f -d 'How long the lease lasts unrenewed.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution claim'" -l namespace -r -f -d 'Only of this namespace.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution claim'" -l instance-tag -r -f -d 'Only with this tag.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution renew'" -l epoch -r -f -d 'As execution claim printed it.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution renew'" -l lease -r -f -d 'How long the lease lasts unrenewed.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution complete'" -l epoch -r -f -d 'As execution claim printed it.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution fail'" -l epoch -r -f -d 'As execution claim printed it.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord execution fail'" -l reason -r -f -d 'Shown with the execution.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord worker'" -a 'run' -d 'Claim executions, run a command for each, renew its lease, and end it by the exit status.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord worker run'" -l once -d 'End when nothing is eligible any more, nor will be after a back-off.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord worker run'" -l concurrency -r -f -d 'Commands at once.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord worker run'" -l lease -r -f -d 'How long a lease lasts unrenewed; at least 1s.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord worker run'" -l owner -r -f -d 'Name of this worker. [default: host and pid]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord worker run'" -l namespace -r -f -d 'Only of this namespace.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord worker run'" -l instance-tag -r -f -d 'Only with this tag.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord reconcile' 1" -f -a 'dependency lease-expiry sibling-cancel orphaned-commits all'
complete -c pgcoord -n "__pgcoord_at 'pgcoord reconcile'" -l batch-limit -r -f -d 'Rows a tick.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord reconcile'" -l stale-threshold-ms -r -f -d 'Leave younger events alone.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord reconcile'" -l namespace -r -f -d 'Only of this namespace.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord reconcile'" -l instance-tag -r -f -d 'Only with this tag.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord reconcile'" -l drain -d 'Tick until nothing is left to do.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord reconcile'" -l loop -d 'Tick for ever, until Ctrl-C.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord reconcile'" -l interval -r -f -d 'With --loop: time between two ticks.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord reconcile'" -l list-quarantined -d 'Only list the events that are not tried any more.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord reconcile'" -l retry -r -f -a 'EVENT_ID all' -d 'Only have quarantined events tried again.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail'" -a 'lease' -d 'Follow the lease events: acquired, renewed, expired, reclaimed, revoked.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail'" -a 'completion' -d 'Follow the completion events: success, failed, cancelled, skipped.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l from -r -f -d 'Start after this cursor. [default: from now on]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l from-start -d 'Start at the oldest event that is kept.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l since -r -f -d 'Start at the first event that came so long ago (10m), or since then.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l until -r -f -a 'TIME CURSOR' -d 'End with what had come by then (at the latest: by now), or at this cursor.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l max -r -f -d 'End after so many events.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l no-follow -d 'End when everything has been shown.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l partition -r -f -d 'Only these; repeatable.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l namespace -r -f -d 'Only these; repeatable.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l instance-tag -r -f -d 'Only these; repeatable.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l event-type -r -f -d 'Only these; repeatable.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l cursor-file -r -F -d 'Resume from the cursor in FILE, and keep it there.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l subscription -r -f -d 'Resume from the database\'s checkpoint NAME.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l lag -d 'Only say how far behind the given cursor is.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail lease'" -l max-lag -r -f -d 'With --lag: exit 3 when more events wait.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l from -r -f -d 'Start after this cursor. [default: from now on]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l from-start -d 'Start at the oldest event that is kept.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l since -r -f -d 'Start at the first event that came so long ago (10m), or since then.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l until -r -f -a 'TIME CURSOR' -d 'End with what had come by then (at the latest: by now), or at this cursor.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l max -r -f -d 'End after so many events.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l no-follow -d 'End when everything has been shown.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l partition -r -f -d 'Only these; repeatable.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l namespace -r -f -d 'Only these; repeatable.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l instance-tag -r -f -d 'Only these; repeatable.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l outcome -r -f -d 'Only these; repeatable.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l cursor-file -r -F -d 'Resume from the cursor in FILE, and keep it there.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l subscription -r -f -d 'Resume from the database\'s checkpoint NAME.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l lag -d 'Only say how far behind the given cursor is.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord tail completion'" -l max-lag -r -f -d 'With --lag: exit 3 when more events wait.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord lock'" -a 'run' -d 'Run a command while holding a lock, so that it never runs twice at once, on whichever machines.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord lock'" -a 'list' -d 'List the locks that are held, by whom, and who waits for them.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord lock'" -a 'who' -d 'Say who holds a lock; exit 3 when nobody does.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord lock'" -a 'break' -d 'End the session that holds a lock, and with it the lock; exit 3 when nobody does.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord lock run'" -l wait -r -f -d 'Wait for the lock. [default: not at all]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord lock run'" -l conflict-exit-code -r -f -d 'When somebody else holds it.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord lock run'" -l kill-grace -r -f -d 'From TERM to KILL, when the lock is lost.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord lock run'" -l fence -d 'Give the command a number in PGCOORD_FENCE that grows each time.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord lock break'" -s y -l yes -d 'Do not ask for the name to be typed.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord subscription'" -a 'list' -d 'List subscriptions: where each stands, and how many events of its outbox lie ahead.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord subscription'" -a 'show' -d 'Show one subscription and who owns it; exit 3 when there is none.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord subscription'" -a 'set' -d 'Move a checkpoint; exit 5 while somebody owns it.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord subscription'" -a 'reset' -d 'Forget a subscription: the next one of that name begins anew, and garbage collection no longer waits for it.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord subscription set'" -l force -d 'Also backwards: what lies between comes again.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord subscription reset'" -l force -d 'It cannot be undone; this says that you know.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc'" -a 'commit-requests' -d 'Delete settled commit requests that are older than the retention.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc'" -a 'lease-events' -d 'Delete lease events that are older than the retention and that every subscription has passed.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc'" -a 'completion-events' -d 'Delete dispatched completion events that are older than the retention and that every subscription has passed.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc'" -a 'all' -d 'Delete all of that: settled commit requests, lease events, completion events.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc commit-requests'" -l older-than -r -f -d 'Keep what is younger; at least 60s. [default: 10m]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc commit-requests'" -l batch-size -r -f -d 'Rows a transaction.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc commit-requests'" -l max-runtime -r -f -d 'Begin no batch after that long, for each table.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc commit-requests'" -l dry-run -d 'Say what would be deleted; change nothing.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc lease-events'" -l older-than -r -f -d 'Keep what is younger; at least 60s. [default: 1d]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc lease-events'" -l batch-size -r -f -d 'Rows a transaction.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc lease-events'" -l max-runtime -r -f -d 'Begin no batch after that long, for each table.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc lease-events'" -l dry-run -d 'Say what would be deleted; change nothing.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc completion-events'" -l older-than -r -f -d 'Keep what is younger; at least 60s. [default: 1d]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc completion-events'" -l batch-size -r -f -d 'Rows a transaction.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc completion-events'" -l max-runtime -r -f -d 'Begin no batch after that long, for each table.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc completion-events'" -l dry-run -d 'Say what would be deleted; change nothing.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc all'" -l older-than -r -f -d 'Keep what is younger; at least 60s. [default: requests 10m, events 1d]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc all'" -l batch-size -r -f -d 'Rows a transaction.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc all'" -l max-runtime -r -f -d 'Begin no batch after that long, for each table.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord gc all'" -l dry-run -d 'Say what would be deleted; change nothing.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev'" -a 'up' -d 'Start the development server, creating it at the first call, and bring its schema up to date.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev'" -a 'down' -d 'Stop the development server.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev'" -a 'dsn' -d 'Print the connection string of the development server; exit 3 if it is not running.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev'" -a 'status' -d 'Say whether the development server runs, and where; exit 3 if it does not.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev up'" -l name -r -f -d 'Which of your servers; demo --keep makes \'demo\'.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev up'" -l server-version -r -f -d 'PostgreSQL 15, 16, 18. [the data\'s, then newest]'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev up'" -l no-migrate -d 'Leave the schema as it is.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev down'" -l name -r -f -d 'Which of your servers; demo --keep makes \'demo\'.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev down'" -l destroy -d 'Remove the data too.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev down'" -l yes -d 'Remove without asking.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev dsn'" -l name -r -f -d 'Which of your servers; demo --keep makes \'demo\'.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord dev status'" -l name -r -f -d 'Which of your servers; demo --keep makes \'demo\'.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord bench'" -l duration -r -f -d 'How long to measure.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord bench'" -l in-flight -r -f -d 'Transactions at the same time.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord bench'" -l keys -r -f -d 'Keys they choose from.'
complete -c pgcoord -n "__pgcoord_at 'pgcoord demo'" -l keep -d 'Leave the server running, and say what to try on it.'
