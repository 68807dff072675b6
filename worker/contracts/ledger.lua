-- The ledger's atomic steps, one function each: redis.call order inside a function is one moment for all others.
-- First key: the prefix of all keys. First argument: the function's name. Times are milliseconds of the server's
-- clock unless the caller gives its own (tests do).

local prefix, name = KEYS[1], ARGV[1]
local runs = prefix .. 'runs'
local FINISH = '-1' -- the run's last step, leased like a shard: it begins when all shards are done
-- keys of a run
local PARTS = {false, 'pending', 'since', 'shards', 'leases', 'tokens', 'attempts', 'results', 'probes', 'strikes'}

local function key(run, part) return prefix .. 'run:' .. run .. (part and ':' .. part or '') end

local function clock(given)
  if given ~= '' then return tonumber(given) end
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function holds(run, shard, token)
  return redis.call('HGET', key(run, 'tokens'), shard) == token and redis.call('ZSCORE', key(run, 'leases'), shard)
end

-- a shard begins to wait; answers 1 where it did not wait before
local function line_up(run, shard)
  redis.call('HSETNX', key(run, 'since'), shard, clock(''))
  return redis.call('ZADD', key(run, 'pending'), 'NX', shard, shard)
end

-- it waits no more; answers how long it did, in milliseconds of the server's clock
local function step_out(run, shard)
  redis.call('ZREM', key(run, 'pending'), shard)
  local since = redis.call('HGET', key(run, 'since'), shard)
  redis.call('HDEL', key(run, 'since'), shard)
  return math.max(0, clock('') - (tonumber(since or '') or clock('')))
end

-- back among those that wait, unless the run was cancelled or the shard is done already
local function wait(run, shard)
  if redis.call('HGET', key(run), 'state') == 'cancelled' then return 0 end
  if redis.call('HEXISTS', key(run, 'results'), shard) == 1 then return 0 end
  return line_up(run, shard)
end

local function count(run, field, amount) redis.call('HINCRBY', key(run), field, amount) end

local function finish_when_done(run)
  if redis.call('HGET', key(run), 'state') ~= 'closed' or redis.call('HEXISTS', key(run), 'finish') == 1 then return 0 end
  if redis.call('ZCARD', key(run, 'pending')) + redis.call('ZCARD', key(run, 'leases')) > 0 then return 0 end
  return wait(run, FINISH)
end

local step = {}

-- header as field, value pairs after the artifact, which stays as it is where '' is given; true where the run is new
function step.open(run, artifact, ...)
  local fresh = redis.call('EXISTS', key(run)) == 0
  redis.call('HSET', key(run), ...)
  if artifact == '' then redis.call('HSETNX', key(run), 'artifact', '')
  else redis.call('HSET', key(run), 'artifact', artifact) end
  redis.call('HSETNX', key(run), 'opened', clock(''))
  redis.call('ZADD', runs, 'NX', 0, run)
  for _, part in ipairs(PARTS) do redis.call('PERSIST', key(run, part)) end
  return fresh and 1 or 0
end

-- pairs of shard, specification; answers how many are newly waiting
function step.send(run, ...)
  local added, given = 0, {...}
  if redis.call('HGET', key(run), 'state') == 'cancelled' then return 0 end
  redis.call('HDEL', key(run), 'finish', 'buried', 'trouble')
  for i = 1, #given, 2 do
    local shard, spec = given[i], given[i + 1]
    if redis.call('HSET', key(run, 'shards'), shard, spec) == 1 then
      count(run, 'submitted', tonumber(spec:match('^%d+')))
    end
    if redis.call('HEXISTS', key(run, 'results'), shard) == 0 and not redis.call('ZSCORE', key(run, 'leases'), shard) then
      added = added + line_up(run, shard)
    end
  end
  return added
end

-- the next shard of the run that was served longest ago, among those that this artifact may serve
function step.claim(artifact, lease, now)
  now = clock(now)
  for _, run in ipairs(redis.call('ZRANGE', runs, 0, -1)) do
    local bound = redis.call('HGET', key(run), 'artifact')
    if bound == '' or bound == artifact then
      local shard = redis.call('ZRANGE', key(run, 'pending'), 0, 0)[1]
      if shard then
        local waited = step_out(run, shard)
        redis.call('HSET', key(run), 'artifact', artifact)
        redis.call('HSETNX', key(run), 'started', now)
        redis.call('ZADD', runs, redis.call('INCR', prefix .. 'turn'), run)
        local token = tostring(redis.call('HINCRBY', key(run), 'fence', 1))
        redis.call('HSET', key(run, 'tokens'), shard, token)
        redis.call('ZADD', key(run, 'leases'), now + lease, shard)
        local attempts = redis.call('HINCRBY', key(run, 'attempts'), shard, 1)
        if attempts > 1 then count(run, 'redeliveries', 1) end
        local probed = redis.call('HGET', key(run, 'probes'), shard)
        if probed then
          redis.call('HINCRBY', key(run, 'strikes'), probed, 1)
          redis.call('HDEL', key(run, 'probes'), shard)
        end
        local header = redis.call('HMGET', key(run), 'uri', 'options')
        local spec = redis.call('HGET', key(run, 'shards'), shard)
        return {run, shard, token, attempts, waited, header[1], header[2], spec}
      end
    end
  end
  return false
end

function step.renew(run, shard, token, lease, now)
  if not holds(run, shard, token) then return 0 end
  redis.call('ZADD', key(run, 'leases'), clock(now) + lease, shard)
  return 1
end

-- what the holder is about to try: a crash from here on is a strike against it; '' for nothing
function step.probe(run, shard, token, trial)
  if not holds(run, shard, token) then return 0 end
  if trial == '' then redis.call('HDEL', key(run, 'probes'), shard)
  else redis.call('HSET', key(run, 'probes'), shard, trial) end
  return 1
end

-- hands a shard back untried, for a reason that people should see: the attempt does not count
function step.release(run, shard, token, trouble)
  if not holds(run, shard, token) then return 0 end
  if trouble ~= '' then redis.call('HSET', key(run), 'trouble', trouble) end
  redis.call('ZREM', key(run, 'leases'), shard)
  redis.call('HDEL', key(run, 'probes'), shard)
  redis.call('HINCRBY', key(run, 'attempts'), shard, -1)
  wait(run, shard)
  return 1
end

-- the shard's part is committed, by whoever: counted once; answers {newly, whether the run's last step now waits}
function step.complete(run, shard, token, ok, rejected, tokens, computed, now)
  if redis.call('EXISTS', key(run)) == 0 then return {0, 0} end
  if redis.call('HGET', key(run, 'tokens'), shard) == token then redis.call('ZREM', key(run, 'leases'), shard) end
  step_out(run, shard)
  redis.call('HDEL', key(run, 'probes'), shard)
  if shard == FINISH then
    redis.call('HDEL', key(run, 'attempts'), shard) -- a run that is resumed has another last step
    return {redis.call('HSETNX', key(run), 'finish', 1), 0}
  end
  local newly = redis.call('HSETNX', key(run, 'results'), shard, table.concat({ok, rejected, tokens, computed}, ' '))
  if newly == 1 then
    count(run, 'ok', ok)
    count(run, 'rejected', rejected)
    count(run, 'tokens', tokens)
    count(run, 'computed', computed)
    redis.call('HSET', key(run), 'finished', clock(now))
    if redis.call('HEXISTS', key(run), 'buried') == 0 then redis.call('HDEL', key(run), 'trouble') end
    redis.call('HDEL', key(run), 'finish') -- a last step that came before this was not the last
  else
    count(run, 'duplicates', 1)
  end
  return {newly, finish_when_done(run)}
end

-- no more shards will be sent; answers whether the run's last step now waits
function step.seal(run)
  redis.call('HSET', key(run), 'state', 'closed')
  return finish_when_done(run)
end

-- a committed part was taken away on purpose: its result counts no more
function step.forget(run, shard)
  local result = redis.call('HGET', key(run, 'results'), shard)
  if not result then return 0 end
  local numbers = {}
  for number in result:gmatch('%d+') do numbers[#numbers + 1] = number end
  for i, field in ipairs({'ok', 'rejected', 'tokens', 'computed'}) do count(run, field, -numbers[i]) end
  redis.call('HDEL', key(run, 'results'), shard)
  redis.call('HDEL', key(run, 'attempts'), shard)
  redis.call('DEL', key(run, 'strikes')) -- by document, for all shards: a suspect elsewhere is found anew
  return 1
end

-- expired leases wait again; answers {shards put back, shards waiting}
function step.reap(now)
  now = clock(now)
  local expired, waiting = 0, 0
  for _, run in ipairs(redis.call('ZRANGE', runs, 0, -1)) do
    for _, shard in ipairs(redis.call('ZRANGEBYSCORE', key(run, 'leases'), '-inf', now)) do
      redis.call('ZREM', key(run, 'leases'), shard)
      redis.call('HDEL', key(run, 'tokens'), shard)
      expired = expired + wait(run, shard)
    end
    waiting = waiting + redis.call('ZCARD', key(run, 'pending'))
  end
  return {expired, waiting}
end

function step.cancel(run)
  if redis.call('EXISTS', key(run)) == 0 then return 0 end
  redis.call('HSET', key(run), 'state', 'cancelled')
  redis.call('DEL', key(run, 'pending'), key(run, 'since'))
  return 1
end

-- a shard that must not be served, for a reason that people should see: nobody is given it until it is sent again
function step.bury(run, shard, trouble)
  redis.call('HSET', key(run), 'trouble', trouble)
  redis.call('ZREM', key(run, 'leases'), shard)
  step_out(run, shard)
  count(run, 'buried', 1)
  return 1
end

-- a worker process lives, for so many milliseconds from now; 0 where it leaves
function step.greet(worker, milliseconds)
  local now = clock('')
  redis.call('ZADD', prefix .. 'workers', now + milliseconds, worker)
  redis.call('ZREMRANGEBYSCORE', prefix .. 'workers', '-inf', now)
  return 1
end

function step.workers() return redis.call('ZRANGEBYSCORE', prefix .. 'workers', '(' .. clock(''), '+inf') end

-- as if the run had never been known
function step.drop(run)
  redis.call('ZREM', runs, run)
  for _, part in ipairs(PARTS) do redis.call('DEL', key(run, part)) end
  return 1
end

-- nothing is left to do: the run is served no more and its entries fade
function step.close(run, seconds)
  redis.call('ZREM', runs, run)
  for _, part in ipairs(PARTS) do redis.call('EXPIRE', key(run, part), seconds) end
  return 1
end

return step[name](unpack(ARGV, 2))
