-- The ledger's atomic steps, one function each: no other client sees a state between two redis.call of one step.
-- First key: the prefix of all keys. First argument: the step's name. Times are milliseconds of the server's clock,
-- unless the caller gives its own (tests do). Each step touches the keys of one run and indexes over all runs, so its
-- cost does not grow with the number of runs.
--
-- Keys of a run (run:<id>…):
--   (none)       hash: uri, options, state, artifact, priority, counters; by value, plan: the plan without shards, as JSON
--   :pending     sorted set of shards that have no message; score: the shard's number
--   :since       hash: when a shard began to wait
--   :shards      hash: documents, first document and sha256 of each shard
--   :sent        hash: the message set that holds a shard whose message was sent and which no worker began
--   :leases      hash: lease id of each leased shard
--   :tokens      hash: tokens computed and all tokens of each leased shard, as its worker told when it renewed the lease
--   :attempts    hash: how often a shard was leased
--   :results     hash: counts of each recorded shard
--   :trial       hash: the trial that a shard's worker is about to make (see worker/queue/poison.py)
--   :strikes     hash: how often each trial ended its worker
--   :quarantined hash: shards that must not be served until they are sent again, with the reason
--   :documents   hash: documents of shards that were sent by value and that no worker has stored in the run's folder
--   :positions   hash: of a stream by value, how far each shard reaches in the input
--   :unable      hash: workers that cannot read the run's folder, with expiry and reason
-- Indexes over all runs:
--   turn:<queue>:<priority>   sorted set of runs with pending shards; score: when it was last served
--   sent:<queue>:<priority>   sorted set of 'run shard' whose message was sent and which no worker began; score: when
--   sent                      sorted set of all those, over all queues, for whoever starts workers (KEDA)
--   documents                 sorted set of runs with documents in Redis; score: their bytes
--   leases                    sorted set of 'run shard'; score: when the lease ends
--   workers, workers:<queue>  sorted sets of live workers; score: until when

local prefix, name = KEYS[1], ARGV[1]
local MOVES = {{MOVES}} -- allowed transitions of a run's state; filled in from ledger.py
local FINISH = 'finish' -- in the place of a shard's number: the run's last step, leased like a shard
local COMMON = 'nermill'
local PRIORITIES = {'3', '6', '9'} -- high, normal, low; Redis serves the smaller number first
local PARTS = {false, 'pending', 'since', 'shards', 'sent', 'leases', 'tokens', 'attempts', 'results', 'trial', 'strikes', 'unable',
  'quarantined', 'documents', 'positions'}
local FORGET_SECONDS = 7 * 86400 -- a run that nobody touches for so long is forgotten

local function key(run, part) return prefix .. 'run:' .. run .. (part and ':' .. part or '') end

local function clock(given)
  if given and given ~= '' then return tonumber(given) end
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function get(run, field) return redis.call('HGET', key(run), field) end
local function state(run) return get(run, 'state') or 'unknown' end
local function count(run, field, amount) redis.call('HINCRBY', key(run), field, amount) end

local function expire(run, seconds)
  for _, part in ipairs(PARTS) do redis.call('EXPIRE', key(run, part), seconds) end
end

local function move(run, to)
  local from = state(run)
  if from == to then return true end
  if not (MOVES[from] and MOVES[from][to]) then return false end
  redis.call('HSET', key(run), 'state', to)
  return true
end

local function queue_of(run)
  local artifact = get(run, 'artifact')
  return (artifact and artifact ~= '') and COMMON .. '.' .. artifact:sub(1, 12) or COMMON
end

local function turn(queue, priority) return prefix .. 'turn:' .. queue .. ':' .. priority end
local function sent(queue, priority) return prefix .. 'sent:' .. queue .. ':' .. priority end
local function join(run, shard) return run .. ' ' .. shard end

local function enroll(run, queue, priority)
  redis.call('SADD', prefix .. 'queues', queue)
  if not redis.call('ZSCORE', turn(queue, priority), run) then
    redis.call('ZADD', turn(queue, priority), redis.call('INCR', prefix .. 'turns'), run)
  end
end

local function leave(run)
  for _, priority in ipairs(PRIORITIES) do
    redis.call('ZREM', turn(queue_of(run), priority), run)
    redis.call('ZREM', turn(COMMON, priority), run)
  end
end

-- the message of a shard, if there is one, is not waited for any more
local function unsend(run, shard)
  local set = redis.call('HGET', key(run, 'sent'), shard)
  if set then
    redis.call('ZREM', set, join(run, shard))
    redis.call('ZREM', prefix .. 'sent', join(run, shard))
    redis.call('HDEL', key(run, 'sent'), shard)
  end
end

local function unlease(run, shard)
  redis.call('HDEL', key(run, 'leases'), shard)
  redis.call('HDEL', key(run, 'tokens'), shard)
  redis.call('ZREM', prefix .. 'leases', join(run, shard))
end

-- what a late step writes for a run that ended is forgotten with the run
local function end_with_run(run)
  if state(run) == 'finished' or state(run) == 'cancelled' then expire(run, redis.call('TTL', key(run))) end
end

-- gives a run its turn: one that is not blocked any more, or whose only message is not waited for (see promote, of runs
-- without an artifact)
local function go_on(run)
  if redis.call('HEXISTS', key(run), 'blocked') == 1 then return end
  local finish = redis.call('ZSCORE', key(run, 'pending'), FINISH)
  if redis.call('ZCARD', key(run, 'pending')) > (finish and 1 or 0) then enroll(run, queue_of(run), get(run, 'priority')) end
  if finish then enroll(run, COMMON, '3') end
end

-- shards come after the run's last step was due: who is at it lost its lease, and what it says does not count
local function put_off_finish(run)
  unsend(run, FINISH)
  unlease(run, FINISH)
  redis.call('HDEL', key(run, 'attempts'), FINISH) -- what comes later is another last step
  redis.call('ZREM', key(run, 'pending'), FINISH)
  redis.call('ZREM', turn(COMMON, '3'), run) -- else shards would be sent to workers of any artifact
  go_on(run)
end

-- a shard waits for a message, unless the run was cancelled or the shard is recorded; a last step, where it is due; answers 1
-- where it is new there
local function wait(run, shard)
  local now = state(run)
  if now == 'cancelled' or now == 'unknown' or redis.call('HEXISTS', key(run, 'results'), shard) == 1 then return 0 end
  if shard == FINISH and now ~= 'finishing' then return 0 end
  unsend(run, shard)
  redis.call('HSETNX', key(run, 'since'), shard, clock())
  local added = redis.call('ZADD', key(run, 'pending'), 'NX', shard == FINISH and '1e18' or shard, shard)
  go_on(run)
  end_with_run(run)
  return added
end

-- whether a producer holds the run, which alone may change it then
local function is_held(run) return redis.call('EXISTS', prefix .. 'stream:' .. run) == 1 end

local function finish_when_done(run)
  local now = state(run)
  if now ~= 'closed' or is_held(run) then return 0 end
  if redis.call('HLEN', key(run, 'results')) < redis.call('HLEN', key(run, 'shards')) then return 0 end
  move(run, 'finishing')
  if redis.call('HEXISTS', key(run, 'leases'), FINISH) + redis.call('HEXISTS', key(run, 'sent'), FINISH) > 0 then return 0 end
  return wait(run, FINISH)
end

-- documents of a shard that are in Redis are not needed there any more
local function remove_documents(run, shard)
  local size = redis.call('HSTRLEN', key(run, 'documents'), shard)
  if size == 0 then return end
  redis.call('HDEL', key(run, 'documents'), shard)
  if tonumber(redis.call('ZINCRBY', prefix .. 'documents', -size, run)) <= 0 then
    redis.call('ZREM', prefix .. 'documents', run)
  end
end

-- bytes of documents in Redis: of all runs, and of this one; runs that were forgotten leave the index
local function held_bytes(run)
  local total, own = 0, 0
  local entries = redis.call('ZRANGE', prefix .. 'documents', 0, -1, 'WITHSCORES')
  for i = 1, #entries, 2 do
    local bytes = tonumber(entries[i + 1])
    if redis.call('EXISTS', key(entries[i], 'documents')) == 0 then redis.call('ZREM', prefix .. 'documents', entries[i])
    else
      total = total + bytes
      if entries[i] == run then own = bytes end
    end
  end
  return total, own
end

local function holds(run, shard, lease) return redis.call('HGET', key(run, 'leases'), shard) == lease end

local function is_there(run, shard)
  return redis.call('HEXISTS', key(run, 'results'), shard) == 1 or redis.call('HEXISTS', key(run, 'sent'), shard) == 1
    or redis.call('HEXISTS', key(run, 'leases'), shard) == 1 or redis.call('ZSCORE', key(run, 'pending'), shard)
end

local function live_workers(queue, now) return redis.call('ZCOUNT', prefix .. 'workers:' .. queue, '(' .. now, '+inf') end

-- the live workers of a queue that said that they cannot read a run's folder: how many, and the last one's reason
local function unable(run, queue, now)
  local found, said = 0, ''
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', prefix .. 'workers:' .. queue, '(' .. now, '+inf')) do
    local entry = redis.call('HGET', key(run, 'unable'), worker)
    if entry and tonumber(entry:match('^%d+')) > now then
      found = found + 1
      said = entry:match('^%d+ (.*)$')
    end
  end
  return found, said
end

local step = {}

-- makes a run known, or known again; answers 1 where it was not
function step.open(run, to, artifact, priority, ...)
  local fresh = state(run) == 'unknown'
  if fresh then redis.call('HSET', key(run), 'state', to, 'opened', clock())
  elseif not move(run, to) then
    return redis.error_reply('run ' .. run .. ' cannot go from ' .. state(run) .. ' to ' .. to)
  end
  if to == 'open' then put_off_finish(run) end -- a stream goes on
  leave(run)
  redis.call('HSET', key(run), 'priority', priority, ...)
  redis.call('HDEL', key(run), 'blocked', 'last_error')
  redis.call('DEL', key(run, 'unable'), key(run, 'quarantined'))
  if artifact ~= '' then redis.call('HSET', key(run), 'artifact', artifact)
  else redis.call('HSETNX', key(run), 'artifact', '') end
  go_on(run)
  expire(run, FORGET_SECONDS)
  return fresh and 1 or 0
end

-- a run takes shards again, and no worker begins its last step any more; answers 0 while one is at that step
function step.reopen(run, to, now)
  if state(run) == 'unknown' or not move(run, to) then return 1 end
  local lease_end = redis.call('ZSCORE', prefix .. 'leases', join(run, FINISH))
  if lease_end and tonumber(lease_end) > clock(now) then return 0 end
  put_off_finish(run)
  return 1
end

-- pairs of shard and specification; answers how many newly wait for a message
function step.add(run, ...)
  local added, given = 0, {...}
  if state(run) == 'cancelled' or state(run) == 'unknown' then return 0 end
  redis.call('HDEL', key(run), 'blocked', 'last_error')
  redis.call('DEL', key(run, 'unable'))
  for i = 1, #given, 2 do
    local shard, spec = given[i], given[i + 1]
    redis.call('HDEL', key(run, 'quarantined'), shard, FINISH)
    if redis.call('HSET', key(run, 'shards'), shard, spec) == 1 then
      count(run, 'submitted', tonumber(spec:match('^%d+')))
    end
    if redis.call('HEXISTS', key(run, 'leases'), shard) == 0 and redis.call('HEXISTS', key(run, 'sent'), shard) == 0 then
      added = added + wait(run, shard)
    end
  end
  if added > 0 then
    if state(run) == 'finishing' or state(run) == 'finished' then move(run, 'closed') end
    put_off_finish(run)
    expire(run, FORGET_SECONDS)
  end
  return added
end

-- pairs of shard and specification of a run by value, whose documents follow; each shard keeps what it has. Answers 'declared',
-- 'another' where one is known with other documents, or 'unknown'
function step.declare(run, ...)
  local given = {...}
  if state(run) == 'unknown' then return 'unknown' end
  for i = 1, #given, 2 do
    local shard, spec = given[i], given[i + 1]
    local known = redis.call('HGET', key(run, 'shards'), shard)
    if not known then
      redis.call('HSET', key(run, 'shards'), shard, spec)
      count(run, 'submitted', tonumber(spec:match('^%d+')))
    elseif known:match('^%d+ %d+') ~= spec:match('^%d+ %d+') then
      return 'another'
    end
  end
  expire(run, FORGET_SECONDS)
  return 'declared'
end

-- the documents of a shard, unless it is recorded or waits or is at work already. Shards of a stream are not declared before;
-- they come with their place in the input and from the producer that holds the stream, while it is open. Answers {the run's
-- state, or 'not held', or 'another' for other documents than those that are known, bytes of all runs, bytes of this one}
function step.offer(run, shard, spec, documents, position, holder)
  local answer = state(run)
  local takes = answer ~= 'cancelled' and answer ~= 'unknown' and (holder == '' or answer == 'open')
  local known = redis.call('HGET', key(run, 'shards'), shard)
  local place = redis.call('HGET', key(run, 'positions'), shard)
  if holder ~= '' and redis.call('GET', prefix .. 'stream:' .. run) ~= holder then answer = 'not held'
  elseif takes and ((place or position) ~= position or (known or spec):match('^%d+ %d+') ~= spec:match('^%d+ %d+')) then
    answer = 'another'
  elseif takes and not is_there(run, shard) then
    if not known then count(run, 'submitted', tonumber(spec:match('^%d+'))) end
    remove_documents(run, shard)
    redis.call('HSET', key(run, 'documents'), shard, documents)
    redis.call('ZINCRBY', prefix .. 'documents', #documents, run)
    redis.call('HSET', key(run, 'shards'), shard, spec)
    if position ~= '' then redis.call('HSET', key(run, 'positions'), shard, position) end
    redis.call('HDEL', key(run, 'quarantined'), shard)
    wait(run, shard)
    expire(run, FORGET_SECONDS)
  end
  return {answer, held_bytes(run)}
end

-- shards that wait, were sent or are leased
function step.at_work(run)
  local answer = redis.call('ZRANGE', key(run, 'pending'), 0, -1)
  for _, part in ipairs({'sent', 'leases'}) do
    for _, shard in ipairs(redis.call('HKEYS', key(run, part))) do answer[#answer + 1] = shard end
  end
  return answer
end

-- how far a shard of a stream by value reaches, for a server that lost it
function step.place(run, shard, position)
  if state(run) == 'unknown' then return 0 end
  return redis.call('HSET', key(run, 'positions'), shard, position)
end

-- shards of a run by value, from one on, whose documents are in the run's folder: their specifications, up to the first that
-- is not, 500 at most
function step.durable(run, first)
  local answer = {}
  for number = tonumber(first), tonumber(first) + 499 do
    local shard = string.format('%d', number)
    local spec = redis.call('HGET', key(run, 'shards'), shard)
    if not spec or redis.call('HEXISTS', key(run, 'documents'), shard) == 1 or not is_there(run, shard) then break end
    answer[#answer + 1] = spec
  end
  return answer
end

-- bytes of documents in Redis: {of all runs, of this one}
function step.held(run) return {held_bytes(run)} end

-- the documents of a shard are in the run's folder now, as the specification says
function step.stored(run, shard, lease, spec)
  if not holds(run, shard, lease) then return 0 end
  redis.call('HSET', key(run, 'shards'), shard, spec)
  remove_documents(run, shard)
  return 1
end

-- moves pending shards of a queue to its message window, runs in turn; answers run, folder, shard, priority of each
function step.promote(queue, now)
  now = clock(now)
  local window, answer = 2 * math.max(1, live_workers(queue, now)), {}
  for _, priority in ipairs(PRIORITIES) do
    local room = window - redis.call('ZCARD', sent(queue, priority))
    while room > 0 do
      local run = redis.call('ZRANGE', turn(queue, priority), 0, 0)[1]
      if not run then break end
      local unbound = queue == COMMON and get(run, 'artifact') == ''
      local begun = redis.call('HLEN', key(run, 'sent')) + redis.call('HLEN', key(run, 'leases'))
      local shard = not (unbound and begun > 0) and redis.call('ZPOPMIN', key(run, 'pending'))[1]
      if shard then
        redis.call('ZADD', sent(queue, priority), now, join(run, shard))
        redis.call('ZADD', prefix .. 'sent', now, join(run, shard))
        redis.call('HSET', key(run, 'sent'), shard, sent(queue, priority))
        redis.call('ZADD', turn(queue, priority), redis.call('INCR', prefix .. 'turns'), run)
        for _, field in ipairs({run, get(run, 'uri'), shard, priority}) do answer[#answer + 1] = field end
        room = room - 1
      else -- of a run without an artifact one shard at a time is under way: its worker binds it
        redis.call('ZREM', turn(queue, priority), run)
      end
    end
  end
  return answer
end

-- leases a shard to a worker; answers its state, and with 'leased' all that is needed to tag it. The last step is due when all
-- shards are recorded; or, with 'whole', for a producer that sees all parts, unless shards may come or somebody holds the run
function step.lease(run, shard, lease, worker, artifact, milliseconds, whole, now)
  now = clock(now)
  if state(run) == 'unknown' then return {'unknown'} end
  if shard ~= FINISH and redis.call('HEXISTS', key(run, 'shards'), shard) == 0 then return {'unknown'} end
  if shard == FINISH and state(run) ~= 'finishing' then
    if whole == '' or state(run) == 'open' or is_held(run) then return {'not due'} end
  end
  local held = redis.call('ZSCORE', prefix .. 'leases', join(run, shard))
  if held and tonumber(held) > now then return {'leased elsewhere'} end
  local is_known = shard == FINISH or is_there(run, shard)
  unsend(run, shard)
  if held then unlease(run, shard) end -- it is over
  if redis.call('HEXISTS', key(run, 'results'), shard) == 1 then return {'done'} end
  if state(run) == 'cancelled' and whole == '' then return {'cancelled'} end
  if redis.call('HEXISTS', key(run, 'quarantined'), shard) == 1 and whole == '' then return {'quarantined'} end
  if not is_known then return {'unknown'} end -- declared, and its documents have not come: the message is of a lost server
  if redis.call('HEXISTS', key(run), 'blocked') == 1 and whole == '' then -- else a producer sees the run's folder
    wait(run, shard)
    return {'blocked'}
  end
  local bound = get(run, 'artifact')
  if shard ~= FINISH and bound ~= '' and bound ~= artifact then
    wait(run, shard)
    return {'other artifact'}
  end
  local entry = redis.call('HGET', key(run, 'unable'), worker)
  if entry and tonumber(entry:match('^%d+')) > now then
    wait(run, shard)
    return {'unable'}
  end
  if bound == '' and shard ~= FINISH then
    leave(run)
    redis.call('HSET', key(run), 'artifact', artifact)
    if redis.call('ZCARD', key(run, 'pending')) > 0 then enroll(run, queue_of(run), get(run, 'priority')) end
  end
  redis.call('ZREM', key(run, 'pending'), shard)
  local since = tonumber(redis.call('HGET', key(run, 'since'), shard) or '') or clock()
  redis.call('HDEL', key(run, 'since'), shard)
  redis.call('HSETNX', key(run), 'started', now)
  redis.call('HSET', key(run, 'leases'), shard, lease)
  redis.call('HDEL', key(run, 'tokens'), shard)
  redis.call('ZADD', prefix .. 'leases', now + milliseconds, join(run, shard))
  local attempts = redis.call('HINCRBY', key(run, 'attempts'), shard, 1)
  if attempts > 1 then count(run, 'redeliveries', 1) end
  local trial = redis.call('HGET', key(run, 'trial'), shard)
  if trial then
    redis.call('HINCRBY', key(run, 'strikes'), trial, 1)
    redis.call('HDEL', key(run, 'trial'), shard)
  end
  -- of a finished run: a part was there, and its worker was lost before it was recorded
  expire(run, state(run) == 'finished' and redis.call('TTL', key(run)) or FORGET_SECONDS)
  local spec = redis.call('HGET', key(run, 'shards'), shard) or ''
  local packed = redis.call('HSTRLEN', key(run, 'documents'), shard)
  return {'leased', attempts, math.max(0, clock() - since), get(run, 'uri'), get(run, 'options'), spec, packed}
end

function step.renew(run, shard, lease, milliseconds, tokens, now)
  if not holds(run, shard, lease) then return 0 end
  if tokens ~= '' then redis.call('HSET', key(run, 'tokens'), shard, tokens) end
  redis.call('ZADD', prefix .. 'leases', clock(now) + milliseconds, join(run, shard))
  return 1
end

-- what the holder is about to try: if it ends now, that trial gets a strike; '' for nothing
function step.probe(run, shard, lease, trial)
  if not holds(run, shard, lease) then return 0 end
  if trial == '' then redis.call('HDEL', key(run, 'trial'), shard)
  else redis.call('HSET', key(run, 'trial'), shard, trial) end
  return 1
end

-- gives a shard back without counting the attempt; an error is shown to people until a shard succeeds
function step.release(run, shard, lease, last_error)
  if not holds(run, shard, lease) then return 0 end
  if last_error ~= '' then redis.call('HSET', key(run), 'last_error', last_error) end
  unlease(run, shard)
  redis.call('HDEL', key(run, 'trial'), shard)
  redis.call('HINCRBY', key(run, 'attempts'), shard, -1)
  wait(run, shard)
  return 1
end

-- a worker cannot read the run's folder; where no live worker can, the run is blocked until it is sent again, or until a
-- worker that had a shard of it records that
function step.unable(run, worker, milliseconds, reason, now)
  now = clock(now)
  if state(run) == 'unknown' then return 0 end
  redis.call('HSET', key(run, 'unable'), worker, (now + milliseconds) .. ' ' .. reason)
  end_with_run(run)
  local queue = queue_of(run)
  local found, said = unable(run, queue, now)
  local live = live_workers(queue, now)
  if found < live then return 0 end
  redis.call('HSET', key(run), 'blocked', 1, 'last_error', 'none of ' .. live .. ' workers can serve it: ' .. said)
  leave(run)
  return 1
end

-- a shard that must not be served until it is sent again, for a reason that people should see
function step.quarantine(run, shard, lease, last_error)
  if state(run) == 'unknown' then return 0 end
  if shard == FINISH and not holds(run, shard, lease) then return 0 end
  redis.call('HSET', key(run), 'last_error', last_error)
  redis.call('HSET', key(run, 'quarantined'), shard, last_error)
  unlease(run, shard)
  unsend(run, shard)
  redis.call('ZREM', key(run, 'pending'), shard)
  redis.call('HDEL', key(run, 'since'), shard)
  go_on(run)
  remove_documents(run, shard)
  end_with_run(run)
  return 1
end

-- the shard's part exists, whoever wrote it: counted once; answers {newly, whether the run's last step is due}
function step.complete(run, shard, lease, worker, ok, rejected, tokens, computed, now)
  if state(run) == 'unknown' then return {0, 0} end
  -- a shard that was recorded before the server lost its memory: the run was sent again without it
  if redis.call('HEXISTS', key(run, 'shards'), shard) == 0 then return {0, 0} end
  if holds(run, shard, lease) then unlease(run, shard) end
  unsend(run, shard)
  redis.call('ZREM', key(run, 'pending'), shard)
  redis.call('HDEL', key(run, 'since'), shard)
  redis.call('HDEL', key(run, 'trial'), shard)
  redis.call('HDEL', key(run, 'unable'), worker)
  remove_documents(run, shard)
  local newly = redis.call('HSETNX', key(run, 'results'), shard, table.concat({ok, rejected, tokens, computed}, ' '))
  if newly == 1 then
    count(run, 'ok', ok)
    count(run, 'rejected', rejected)
    count(run, 'tokens', tokens)
    count(run, 'computed', computed)
    redis.call('HSET', key(run), 'finished', clock(now))
    redis.call('HDEL', key(run), 'blocked') -- this worker can read the run's folder
    if redis.call('EXISTS', key(run, 'quarantined')) == 0 then redis.call('HDEL', key(run), 'last_error') end
  else
    count(run, 'duplicates', 1)
  end
  go_on(run)
  end_with_run(run)
  return {newly, finish_when_done(run)}
end

-- no more shards will be added; answers whether the run's last step is due. A run that ended meanwhile stays so
function step.seal(run)
  local now = state(run)
  if now == 'finished' or now == 'cancelled' or not move(run, 'closed') then return 0 end
  return finish_when_done(run)
end

-- a committed part was removed on purpose: its result does not count any more
function step.forget(run, shard)
  local result = redis.call('HGET', key(run, 'results'), shard)
  if not result then return 0 end
  local numbers = {}
  for number in result:gmatch('%d+') do numbers[#numbers + 1] = number end
  for i, field in ipairs({'ok', 'rejected', 'tokens', 'computed'}) do count(run, field, -numbers[i]) end
  redis.call('HDEL', key(run, 'results'), shard)
  redis.call('HDEL', key(run, 'attempts'), shard)
  redis.call('DEL', key(run, 'strikes')) -- of all shards: a poison document of another shard is found again
  return 1
end

-- expired leases wait for a message again; answers how many there were (2,000 at most a call)
function step.expire(now)
  local expired = redis.call('ZRANGEBYSCORE', prefix .. 'leases', '-inf', clock(now), 'LIMIT', 0, 2000)
  for _, member in ipairs(expired) do
    local run, shard = member:match('^(.*) (.-)$')
    unlease(run, shard)
    -- of a producer that saw all parts and was lost: a worker does it
    if shard == FINISH and state(run) == 'closed' and not is_held(run) then move(run, 'finishing') end
    wait(run, shard)
  end
  held_bytes('')
  return #expired
end

-- messages of a queue that must be sent again. depth: messages in the queue. A message that was sent, was not begun and
-- is not in the queue is lost or about to begin: what is missing in two looks one after the other is sent again, the
-- oldest first; all of it where the queue is empty. Answers run, folder, shard, priority of each.
function step.recover(queue, depth, settle, now)
  now = clock(now)
  local waiting, missing = {}, -tonumber(depth)
  for _, priority in ipairs(PRIORITIES) do
    missing = missing + redis.call('ZCARD', sent(queue, priority))
    local aged = redis.call('ZRANGEBYSCORE', sent(queue, priority), '-inf', now - settle, 'WITHSCORES', 'LIMIT', 0, 2000)
    for i = 1, #aged, 2 do waiting[#waiting + 1] = {tonumber(aged[i + 1]), aged[i], priority} end
  end
  local before = tonumber(redis.call('HGET', prefix .. 'missing', queue) or '0')
  redis.call('HSET', prefix .. 'missing', queue, math.max(0, missing))
  local again = depth == '0' and #waiting or math.min(before, missing, #waiting)
  table.sort(waiting, function(a, b) return a[1] < b[1] or (a[1] == b[1] and a[2] < b[2]) end)
  local answer = {}
  for i = 1, again do
    local _, member, priority = unpack(waiting[i])
    local run, shard = member:match('^(.*) (.-)$')
    if state(run) == 'unknown' or state(run) == 'cancelled' then
      redis.call('ZREM', sent(queue, priority), member)
      redis.call('ZREM', prefix .. 'sent', member)
    else
      redis.call('ZADD', sent(queue, priority), now, member)
      for _, field in ipairs({run, get(run, 'uri'), shard, priority}) do answer[#answer + 1] = field end
    end
  end
  return answer
end

function step.cancel(run)
  if not move(run, 'cancelled') then return 0 end
  leave(run)
  for _, shard in ipairs(redis.call('HKEYS', key(run, 'sent'))) do unsend(run, shard) end
  redis.call('DEL', key(run, 'pending'), key(run, 'since'))
  for _, shard in ipairs(redis.call('HKEYS', key(run, 'documents'))) do
    if redis.call('HEXISTS', key(run, 'leases'), shard) == 0 then remove_documents(run, shard) end
  end
  expire(run, 86400)
  return 1
end

-- a worker process lives, for so many milliseconds from now; 0 where it leaves
function step.register(worker, name, queue, milliseconds)
  local now = clock()
  for set, member in pairs({workers = worker, ['workers:' .. COMMON] = name, ['workers:' .. queue] = name}) do
    if milliseconds == '0' then redis.call('ZREM', prefix .. set, member)
    else redis.call('ZADD', prefix .. set, now + milliseconds, member) end
    redis.call('ZREMRANGEBYSCORE', prefix .. set, '-inf', now)
  end
  redis.call('SADD', prefix .. 'queues', queue)
  return 1
end

function step.workers() return redis.call('ZRANGEBYSCORE', prefix .. 'workers', '(' .. clock(), '+inf') end

-- shards that wait for a message or were sent, and shards that are leased, over all runs (of 1,000 runs a queue at most)
function step.load()
  local waiting = 0
  for _, queue in ipairs(redis.call('SMEMBERS', prefix .. 'queues')) do
    for _, priority in ipairs(PRIORITIES) do
      waiting = waiting + redis.call('ZCARD', sent(queue, priority))
      for _, run in ipairs(redis.call('ZRANGE', turn(queue, priority), 0, 999)) do
        local pending = redis.call('ZCARD', key(run, 'pending'))
        if pending == 0 then redis.call('ZREM', turn(queue, priority), run) end -- forgotten, or all of it was sent
        waiting = waiting + pending
      end
    end
  end
  return {waiting, redis.call('ZCARD', prefix .. 'leases')}
end

-- queues with shards that no worker began
function step.waiting()
  local answer = {}
  for _, queue in ipairs(redis.call('SMEMBERS', prefix .. 'queues')) do
    local waiting = 0
    for _, priority in ipairs(PRIORITIES) do
      waiting = waiting + redis.call('ZCARD', sent(queue, priority)) + redis.call('ZCARD', turn(queue, priority))
    end
    if waiting > 0 then answer[#answer + 1] = queue end
  end
  return answer
end

-- the server forgets a run at once
function step.drop(run)
  leave(run)
  for _, shard in ipairs(redis.call('HKEYS', key(run, 'sent'))) do unsend(run, shard) end
  for _, shard in ipairs(redis.call('HKEYS', key(run, 'leases'))) do unlease(run, shard) end
  for _, part in ipairs(PARTS) do redis.call('DEL', key(run, part)) end
  redis.call('ZREM', prefix .. 'documents', run)
  return 1
end

-- nothing is left to do: the run is served no more, and its counters stay readable for a while
function step.close(run, lease, seconds, scores)
  if state(run) == 'unknown' then return 0 end
  if lease ~= '' and not holds(run, FINISH, lease) then return 0 end
  unlease(run, FINISH)
  unsend(run, FINISH)
  redis.call('HDEL', key(run, 'attempts'), FINISH) -- a run that is resumed has another last step
  redis.call('HDEL', key(run), 'blocked')
  redis.call('HDEL', key(run, 'quarantined'), FINISH)
  for _, shard in ipairs(redis.call('HKEYS', key(run, 'sent'))) do unsend(run, shard) end -- their parts are there
  for _, shard in ipairs(redis.call('HKEYS', key(run, 'documents'))) do
    if redis.call('HEXISTS', key(run, 'leases'), shard) == 0 then remove_documents(run, shard) end
  end
  redis.call('DEL', key(run, 'pending'), key(run, 'since'))
  leave(run)
  if state(run) == 'closed' then move(run, 'finishing') end
  move(run, 'finished')
  if scores ~= '' then redis.call('HSET', key(run), 'scores', scores) end
  expire(run, seconds)
  return 1
end

return step[name](unpack(ARGV, 2))
