@echo off
rem Opens the app, for people who do not use a terminal: double-click it.
rem The first time, it makes an environment beside itself, .venv, and installs everything into it.
rem
rem   set PIP_ARGS=...   passed on to pip
rem
rem Arguments are those of "dora-diffusion app".

setlocal
pushd "%~dp0"
set "PYTHONUTF8=1"
set "CHECK=import sys; sys.exit(sys.version_info < (3, 10) or sys.maxsize < 2**32)"

set "PYTHON="
py -3 -c "%CHECK%" >nul 2>nul
if not errorlevel 1 set "PYTHON=py -3"
if defined PYTHON goto found
python -c "%CHECK%" >nul 2>nul
if not errorlevel 1 set "PYTHON=python"
if defined PYTHON goto found

echo Python 3.10 or later, 64 bit, is missing. Install it, then start again:
echo   https://www.python.org/downloads/windows/
set "CODE=1"
goto failed

:found
%PYTHON% tools\start_app.py %*
set "CODE=%ERRORLEVEL%"
if "%CODE%"=="0" exit /b 0

:failed
echo.
echo This did not work (exit code %CODE%): the lines above say why.
pause
exit /b %CODE%
