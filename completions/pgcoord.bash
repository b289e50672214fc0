# Completion of pgcoord in bash 3.2 and later.
# Written by docs/generate.py from the command tree. Change the commands and run it again.

# Sets `commands`, `options` and `valued` (the options that take a value) of the command $1.
_pgcoord_command() {
    commands='' options='--dsn --schema -o --output -q --quiet -v --verbose --color --log-format --version -h --help'
    valued='--dsn --schema -o --output --color --log-format'
    case $1 in
        'pgcoord')
            commands='migrate leader kv commit flow execution worker reconcile tail lock subscription gc dev bench demo'
            ;;
        'pgcoord migrate')
            commands='up status sql verify grant'
            ;;
        'pgcoord migrate up')
            options="--to --dry-run --lock-timeout $options"
            valued="--to --lock-timeout $valued"
            ;;
        'pgcoord migrate status')
            options="--check $options"
            ;;
        'pgcoord migrate sql')
            options="--to $options"
            valued="--to $valued"
            ;;
        'pgcoord migrate grant')
            options="--reader --client --operator --dry-run $options"
            valued="--reader --client --operator $valued"
            ;;
        'pgcoord leader')
            commands='run status wait step-down history assert'
            ;;
        'pgcoord leader run')
            options="--node-id --ttl --with $options"
            valued="--node-id --ttl --with $valued"
            ;;
        'pgcoord leader status')
            options="-w --watch --interval $options"
            valued="--interval $valued"
            ;;
        'pgcoord leader wait')
            options="--timeout $options"
            valued="--timeout $valued"
            ;;
        'pgcoord leader step-down')
            options="--wait --timeout $options"
            valued="--timeout $valued"
            ;;
        'pgcoord leader history')
            options="--since --limit $options"
            valued="--since --limit $valued"
            ;;
        'pgcoord leader assert')
            options="--epoch $options"
            valued="--epoch $valued"
            ;;
        'pgcoord kv')
            commands='get set clear clear-range add watch txn load export range'
            ;;
        'pgcoord kv get')
            options="--hex --integer --raw --at $options"
            valued="--at $valued"
            ;;
        'pgcoord kv set')
            options="--value-file --hex --timeout $options"
            valued="--value-file --timeout $valued"
            ;;
        'pgcoord kv clear')
            options="--prefix -y --yes --hex --timeout $options"
            valued="--prefix --timeout $valued"
            ;;
        'pgcoord kv clear-range')
            options="--hex --timeout $options"
            valued="--timeout $valued"
            ;;
        'pgcoord kv add')
            options="--hex --timeout $options"
            valued="--timeout $valued"
            ;;
        'pgcoord kv watch')
            options="--prefix --changes-only --max --timeout --attempts --hex $options"
            valued="--prefix --max --timeout --attempts $valued"
            ;;
        'pgcoord kv txn')
            options="--timeout $options"
            valued="--timeout $valued"
            ;;
        'pgcoord kv load')
            options="--batch-size --timeout $options"
            valued="--batch-size --timeout $valued"
            ;;
        'pgcoord kv export')
            options="--prefix --hex $options"
            valued="--prefix $valued"
            ;;
        'pgcoord kv range')
            options="--prefix --limit --reverse --hex $options"
            valued="--prefix --limit $valued"
            ;;
        'pgcoord commit')
            commands='list show explain'
            ;;
        'pgcoord commit list')
            options="--status --limit $options"
            valued="--status --limit $valued"
            ;;
        'pgcoord commit explain')
            options="--hot --since --limit $options"
            valued="--since --limit $valued"
            ;;
        'pgcoord flow')
            commands='create show list cancel'
            ;;
        'pgcoord flow create')
            options="--check $options"
            ;;
        'pgcoord flow show')
            options="--format $options"
            valued="--format $valued"
            ;;
        'pgcoord flow list')
            options="--namespace --limit $options"
            valued="--namespace --limit $valued"
            ;;
        'pgcoord execution')
            commands='claim renew complete fail revoke show'
            ;;
        'pgcoord execution claim')
            options="--owner --lease --namespace --instance-tag $options"
            valued="--owner --lease --namespace --instance-tag $valued"
            ;;
        'pgcoord execution renew')
            options="--epoch --lease $options"
            valued="--epoch --lease $valued"
            ;;
        'pgcoord execution complete')
            options="--epoch $options"
            valued="--epoch $valued"
            ;;
        'pgcoord execution fail')
            options="--epoch --reason $options"
            valued="--epoch --reason $valued"
            ;;
        'pgcoord worker')
            commands='run'
            ;;
        'pgcoord worker run')
            options="--once --concurrency --lease --owner --namespace --instance-tag $options"
            valued="--concurrency --lease --owner --namespace --instance-tag $valued"
            ;;
        'pgcoord reconcile')
            options="--batch-limit --stale-threshold-ms --namespace --instance-tag --drain --loop --interval --list-quarantined --retry $options"
            valued="--batch-limit --stale-threshold-ms --namespace --instance-tag --interval --retry $valued"
            ;;
        'pgcoord tail')
            commands='lease completion'
            ;;
        'pgcoord tail lease')
            options="--from --from-start --since --until --max --no-follow --partition --namespace --instance-tag --event-type --cursor-file --subscription --lag --max-lag --exec --batch --attempts $options"
            valued="--from --since --until --max --partition --namespace --instance-tag --event-type --cursor-file --subscription --max-lag --batch --attempts $valued"
            ;;
        'pgcoord tail completion')
            options="--from --from-start --since --until --max --no-follow --partition --namespace --instance-tag --outcome --cursor-file --subscription --lag --max-lag --exec --batch --attempts $options"
            valued="--from --since --until --max --partition --namespace --instance-tag --outcome --cursor-file --subscription --max-lag --batch --attempts $valued"
            ;;
        'pgcoord lock')
            commands='run list who break'
            ;;
        'pgcoord lock run')
            options="--wait --conflict-exit-code --kill-grace --fence $options"
            valued="--wait --conflict-exit-code --kill-grace $valued"
            ;;
        'pgcoord lock break')
            options="-y --yes $options"
            ;;
        'pgcoord subscription')
            commands='list show set reset'
            ;;
        'pgcoord subscription set')
            options="--force $options"
            ;;
        'pgcoord subscription reset')
            options="--force $options"
            ;;
        'pgcoord gc')
            commands='commit-requests lease-events completion-events all'
            ;;
        'pgcoord gc commit-requests')
            options="--older-than --batch-size --max-runtime --dry-run $options"
            valued="--older-than --batch-size --max-runtime $valued"
            ;;
        'pgcoord gc lease-events')
            options="--older-than --batch-size --max-runtime --dry-run $options"
            valued="--older-than --batch-size --max-runtime $valued"
            ;;
        'pgcoord gc completion-events')
            options="--older-than --batch-size --max-runtime --dry-run $options"
            valued="--older-than --batch-size --max-runtime $valued"
            ;;
        'pgcoord gc all')
            options="--older-than --batch-size --max-runtime --dry-run $options"
            valued="--older-than --batch-size --max-runtime $valued"
            ;;
        'pgcoord dev')
            commands='up down dsn status'
            ;;
        'pgcoord dev up')
            options="--name --server-version --no-migrate $options"
            valued="--name --server-version $valued"
            ;;
        'pgcoord dev down')
            options="--name --destroy --yes $options"
            valued="--name $valued"
            ;;
        'pgcoord dev dsn')
            options="--name $options"
            valued="--name $valued"
            ;;
        'pgcoord dev status')
            options="--name $options"
            valued="--name $valued"
            ;;
        'pgcoord bench')
            options="--duration --in-flight --keys $options"
            valued="--duration --in-flight --keys $valued"
            ;;
        'pgcoord demo')
            options="--keep $options"
            ;;
    esac
}

# Sets `how` to the arguments of compgen for the values of option or argument $2 of command $1.
_pgcoord_value() {
    case "$1 $2" in
        *' -o') how=(-W 'table plain json jsonl csv markdown') ;;
        *' --output') how=(-W 'table plain json jsonl csv markdown') ;;
        *' --color') how=(-W 'auto always never') ;;
        *' --log-format') how=(-W 'text json') ;;
        'pgcoord leader run --with') how=(-W 'dispatch') ;;
        'pgcoord kv set --value-file') how=(-f) ;;
        'pgcoord kv txn 1') how=(-f) ;;
        'pgcoord kv load 1') how=(-f) ;;
        'pgcoord flow create 1') how=(-f) ;;
        'pgcoord flow show --format') how=(-W 'tree mermaid dot json') ;;
        'pgcoord reconcile 1') how=(-W 'dependency lease-expiry sibling-cancel orphaned-commits all') ;;
        'pgcoord reconcile --retry') how=(-W 'all') ;;
        'pgcoord tail lease --cursor-file') how=(-f) ;;
        'pgcoord tail completion --cursor-file') how=(-f) ;;
    esac
}

# Fills COMPREPLY with the lines of `compgen "$@"`, which may contain spaces.
_pgcoord_reply() {
    local found
    while IFS= read -r found; do
        [[ -n $found ]] && COMPREPLY+=("$found")
    done <<<"$(compgen "$@")"
    # From bash 4 on: readline then quotes the words as file names.
    [[ $1 == -W ]] || compopt -o filenames 2>/dev/null
}

_pgcoord() {
    local cur=${COMP_WORDS[COMP_CWORD]} path=pgcoord position=1 awaited='' plain='' index word
    local commands options valued
    local -a how=()
    COMPREPLY=()
    _pgcoord_command "$path"
    for ((index = 1; index < COMP_CWORD; index++)); do
        word=${COMP_WORDS[index]}
        if [[ $word == [=:]* ]]; then
            # Bash splits words at = and :, so that the next word belongs to the last one.
            ((++index < COMP_CWORD)) && awaited=''
        elif [[ -n $awaited ]]; then
            awaited=''
        elif [[ -n $plain ]]; then
            ((position++))
        elif [[ $word == -- ]]; then
            plain=yes
        elif [[ $word == -* ]]; then
            [[ " $valued " == *" $word "* ]] && awaited=$word
        elif [[ " $commands " == *" $word "* ]]; then
            path="$path $word" position=1
            _pgcoord_command "$path"
        else
            ((position++))
        fi
    done
    if [[ -n $awaited ]]; then
        [[ $cur == '=' ]] && cur=''
        _pgcoord_value "$path" "$awaited"
    elif [[ $cur == [=:]* || ${COMP_WORDS[COMP_CWORD - 1]} == [=:]* ]]; then
        return
    elif [[ -z $plain && $cur == --*=* ]]; then
        _pgcoord_value "$path" "${cur%%=*}"
        ((${#how[@]})) && _pgcoord_reply "${how[@]}" -P "${cur%%=*}=" -- "${cur#*=}"
        return
    elif [[ -z $plain && $cur == -* ]]; then
        how=(-W "$options")
    elif [[ -n $commands ]]; then
        how=(-W "$commands")
    else
        _pgcoord_value "$path" "$position"
    fi
    ((${#how[@]})) && _pgcoord_reply "${how[@]}" -- "$cur"
}

complete -F _pgcoord pgcoord
