-- What stands between scripts and the proxy, loaded before the script. A method of the proxy answers a number first:
-- 0 and the values that it returns, 1 and an error, or 2 where the script has to wait. So an error is a text with the
-- script's line before it (a script may catch and print it), and waiting is an ordinary yield.
local error, yield = error, coroutine.yield

local function done(kind, ...)
  if kind == 0 then
    return ...
  elseif kind == 1 then
    error((...), 2)
  end
  return yield()
end

local function wrap(method)
  return function(...)
    return done(method(...))
  end
end

local function bind(method, object)
  return function()
    return method(object)
  end
end

return wrap, bind
